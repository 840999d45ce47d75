-- Removes a worker incarnation that computes nothing any more; what it still holds goes back without blame.
-- running -> queued
-- KEYS  1 workers (zset)
-- ARGV  1 incarnation
-- Returns 'OK'
local held = P .. 'held:' .. ARGV[1]
for _, id in ipairs(redis.call('SMEMBERS', held)) do
  redis.call('SREM', held, id)
  local v = redis.call('HMGET', P .. 'req:' .. id, 'state', 'owner')
  if v[1] == 'running' and v[2] == ARGV[1] then requeue(id, '', '', {what = 'left'}) end
end
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('DEL', P .. 'w:' .. ARGV[1], P .. 'ctl:' .. ARGV[1], held)
return 'OK'
