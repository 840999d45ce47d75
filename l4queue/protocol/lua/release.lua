-- Gives a running request back with its progress. running -> queued (the solo queue after two crashes) | dead
-- KEYS  1 req:<id>
-- ARGV  1 id  2 incarnation  3 epoch  4 stage ('' = where it was)  5 score ('' = as before)
--       6 '1' blames a crash on it, '0' does not  7 crashes alone that condemn
--       8 kind of move ('' = none | hand-over | escape | steal)  9 predicted benefit (ms)  10 predicted cost (ms)
--       11 ticket of its KV cache ('' = none kept)
-- Returns 'OK' | 'DUP' | 'FENCED'
local v = redis.call('HMGET', KEYS[1], 'state', 'owner', 'epoch')
if (v[1] == 'queued' or v[1] == 'dead') and v[3] == ARGV[3] then return 'DUP' end
if not is_owner(v, ARGV[2], ARGV[3]) then return 'FENCED' end
redis.call('SREM', P .. 'held:' .. ARGV[2], ARGV[1])
if ARGV[6] == '1' and crashed(ARGV[1], ARGV[7]) then return 'OK' end
local line = {what = ARGV[6] == '1' and 'crashed' or 'released'}
if ARGV[8] ~= '' then
  line.what, line.benefit_ms, line.cost_ms, line.kv = ARGV[8], tonumber(ARGV[9]), tonumber(ARGV[10]), ARGV[11] ~= ''
  redis.call('HINCRBY', P .. 'counts', ARGV[8] == 'steal' and 'steals_running' or 'handovers', 1)
end
requeue(ARGV[1], ARGV[4], ARGV[5], line)
if ARGV[11] ~= '' then redis.call('HSET', KEYS[1], 'kv', ARGV[11]) end
return 'OK'
