-- Moves waiting requests of a stage that the plan no longer has (or of one queue to another). queued -> queued
-- KEYS  1 q:<from> (zset)
-- ARGV  1 from  2 to  3 most requests
-- Returns the number moved
local n = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '+inf', 'LIMIT', 0, ARGV[3])) do
  local rk = P .. 'req:' .. id
  local v = redis.call('HMGET', rk, 'state', 'stage', 'prompt_tokens', 'offset', 'score')
  if v[1] == 'queued' and v[2] == ARGV[1] then
    local tokens = tonumber(v[3]) + tonumber(v[4])
    dequeue(id, ARGV[1], tokens)
    redis.call('HSET', rk, 'stage', ARGV[2])
    enqueue(id, ARGV[2], v[5], tokens)
    n = n + 1
  else
    dequeue(id, ARGV[1], 0)
  end
end
return n
