-- Extends the lease of a registered worker incarnation and leaves its news as they are.
-- KEYS  1 workers (zset: incarnation -> expiry ms)  2 w:<incarnation> (hash)
-- ARGV  1 incarnation  2 lease (ms)
-- Returns 'OK' | 'LOST' (the lease ran out and was reaped)
local workers, worker = unpack(KEYS)
local incarnation, lease_ms = ARGV[1], tonumber(ARGV[2])
if not redis.call('ZSCORE', workers, incarnation) then return 'LOST' end
redis.call('HDEL', worker, 'graced')
redis.call('ZADD', workers, 'GT', int(now_ms() + lease_ms), incarnation)
return 'OK'
