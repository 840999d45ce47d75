-- Extends the lease of a registered worker incarnation and leaves its news as they are.
-- KEYS  1 workers (zset: incarnation -> expiry ms)  2 w:<incarnation> (hash)
-- ARGV  1 incarnation  2 lease (ms)
-- Returns 'OK' | 'LOST' (the lease ran out and was reaped)
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 'LOST' end
redis.call('HDEL', KEYS[2], 'graced')
redis.call('ZADD', KEYS[1], 'GT', int(now_ms() + ARGV[2]), ARGV[1])
return 'OK'
