-- Removes a worker incarnation that holds nothing any more.
-- KEYS  1 workers (zset)
-- ARGV  1 incarnation
-- Returns 'OK' | 'HOLDS' (the reaper will see to the rest)
if redis.call('SCARD', P .. 'held:' .. ARGV[1]) > 0 then return 'HOLDS' end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', P .. 'w:' .. ARGV[1], P .. 'ctl:' .. ARGV[1], P .. 'held:' .. ARGV[1])
return 'OK'
