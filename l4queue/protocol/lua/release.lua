-- Gives a running request back with its progress. running -> queued (the solo queue after two crashes) | dead
-- KEYS  1 req:<id>
-- ARGV  1 id  2 incarnation  3 epoch  4 stage ('' = where it was)  5 score ('' = as before)
--       6 '1' blames a crash on it, '0' does not  7 crashes alone that condemn
--       8 kind of move ('' = none | hand-over | escape | steal)  9 predicted benefit (ms)  10 predicted cost (ms)
--       11 ticket of its KV cache ('' = none kept)
-- Returns 'OK' | 'DUP' | 'FENCED'
local record = KEYS[1]
local id, incarnation, epoch, stage, score = unpack(ARGV, 1, 5)
local is_blamed, max_crashes, move, ticket = ARGV[6] == '1', tonumber(ARGV[7]), ARGV[8], ARGV[11]
local benefit_ms, cost_ms = tonumber(ARGV[9]), tonumber(ARGV[10])
local request = fields(record, {'state', 'owner', 'epoch'})
if (request.state == 'queued' or request.state == 'dead') and request.epoch == epoch then return 'DUP' end
if not is_owner(request, incarnation, epoch) then return 'FENCED' end
redis.call('SREM', P .. 'held:' .. incarnation, id)
if is_blamed and crashed(id, max_crashes) then return 'OK' end
local line = {what = is_blamed and 'crashed' or 'released'}
if move ~= '' then
  line.what, line.benefit_ms, line.cost_ms, line.kv = move, benefit_ms, cost_ms, ticket ~= ''
  count(move == 'steal' and 'steals_running' or 'handovers', 1)
end
requeue(id, stage, score, line)
if ticket ~= '' then redis.call('HSET', record, 'kv', ticket) end
return 'OK'
