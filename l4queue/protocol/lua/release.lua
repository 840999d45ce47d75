-- Gives a running request back with its progress. running -> queued (the solo queue after two crashes) | dead
-- KEYS  1 req:<id>
-- ARGV  1 id  2 incarnation  3 epoch  4 stage ('' = where it was)  5 score ('' = as before)
--       6 '1' blames a crash on it, '0' does not  7 crashes alone that condemn
-- Returns 'OK' | 'DUP' | 'FENCED'
local v = redis.call('HMGET', KEYS[1], 'state', 'owner', 'epoch')
if (v[1] == 'queued' or v[1] == 'dead') and v[3] == ARGV[3] then return 'DUP' end
if not is_owner(v, ARGV[2], ARGV[3]) then return 'FENCED' end
redis.call('SREM', P .. 'held:' .. ARGV[2], ARGV[1])
if ARGV[6] ~= '1' or not crashed(ARGV[1], ARGV[7]) then requeue(ARGV[1], ARGV[4], ARGV[5]) end
return 'OK'
