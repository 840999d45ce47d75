-- Registers a worker incarnation or renews its lease, and publishes its load and counters.
-- KEYS  1 workers (zset: incarnation -> expiry ms)  2 w:<incarnation> (hash)  3 hist
-- ARGV  1 incarnation  2 lease (ms)  3 worker id  4 load (JSON)  5 register ('1') or renew ('0')
--       6 sequence number of this heartbeat  7.. pairs of hist field, increment
-- The term of the lease is noted for reapers: an expiry beyond it is impossible.
-- Returns 'OK' | 'LOST' (the lease ran out and was reaped: take a new incarnation)
if ARGV[5] ~= '1' and not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 'LOST' end
local t = now_ms()
local fresh = redis.call('HGET', KEYS[2], 'seq') ~= ARGV[6]
redis.call('HDEL', KEYS[2], 'graced')
redis.call('ZADD', KEYS[1], int(t + ARGV[2]), ARGV[1])
redis.call('HSET', KEYS[2], 'worker', ARGV[3], 'load', ARGV[4], 'seq', ARGV[6], 'seen_ms', int(t),
  'lease_ms', ARGV[2])
if fresh then
  for i = 7, #ARGV, 2 do redis.call('HINCRBY', KEYS[3], ARGV[i], ARGV[i + 1]) end
end
return 'OK'
