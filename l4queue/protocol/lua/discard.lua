-- Removes a request that has ended, with its output: its client has it. (terminal) -> (absent)
-- KEYS  1 req:<id>  2 out:<id>  3 results (zset)  4 keyed (zset)
-- ARGV  1 id
-- Returns 'OK' | 'UNKNOWN' | 'LIVE'
local v = redis.call('HMGET', KEYS[1], 'state', 'finished_ms', 'kept_bytes')
if not v[1] then return 'UNKNOWN' end
if not v[2] then return 'LIVE' end
redis.call('UNLINK', KEYS[1], KEYS[2])
if v[3] and redis.call('ZREM', KEYS[3], ARGV[1] .. ' ' .. v[3]) + redis.call('ZREM', KEYS[4], ARGV[1] .. ' ' .. v[3]) > 0 then
  redis.call('HINCRBY', P .. 'counts', 'result_bytes', -v[3])
end
given(ARGV[1])
return 'OK'
