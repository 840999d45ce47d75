-- Moves waiting requests of one queue to the stages that their lengths belong to now. queued -> queued
-- For a stage that the plan no longer has, a range that has changed, the own queue of a worker that is gone.
-- KEYS  1 q:<from> (zset)
-- ARGV  1 from  2 so many at the head are left out  3 most requests looked at
--       4.. upper ends of the stages but the last (tokens, ascending)
-- Returns {moved, looked at}
local n, ids = 0, redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '+inf', 'LIMIT', ARGV[2], ARGV[3])
for _, id in ipairs(ids) do
  local rk = P .. 'req:' .. id
  local v = redis.call('HMGET', rk, 'state', 'stage', 'prompt_tokens', 'offset', 'score')
  local what = v[1] == 'queued' and v[2] == ARGV[1] and fault(id)
  if what then
    condemn(id, what)
  elseif v[1] == 'queued' and v[2] == ARGV[1] then
    local tokens, to = tonumber(v[3]) + tonumber(v[4]), 0
    while ARGV[4 + to] and tokens >= tonumber(ARGV[4 + to]) do to = to + 1 end
    to = int(to)
    if to ~= ARGV[1] then
      dequeue(id, ARGV[1], tokens)
      redis.call('HSET', rk, 'stage', to)
      note(rk, {what = 'rerouted', from = ARGV[1], to = to})
      enqueue(id, to, v[5], tokens)
      n = n + 1
    end
  else
    dequeue(id, ARGV[1], 0)
  end
end
return {n, #ids}
