-- Gives a running request back with its progress. running -> queued (the solo queue after two crashes)
-- KEYS  1 req:<id>
-- ARGV  1 id  2 incarnation  3 epoch  4 stage ('' = where it was)  5 score ('' = as before)
--       6 crashes to blame on it (0 or 1)
-- Returns 'OK' | 'DUP' | 'FENCED'
local v = redis.call('HMGET', KEYS[1], 'state', 'owner', 'epoch')
if v[1] == 'queued' and v[3] == ARGV[3] then return 'DUP' end
if not is_owner(v, ARGV[2], ARGV[3]) then return 'FENCED' end
redis.call('SREM', P .. 'held:' .. ARGV[2], ARGV[1])
redis.call('HINCRBY', KEYS[1], 'crashes', ARGV[6])
requeue(ARGV[1], ARGV[4], ARGV[5])
return 'OK'
