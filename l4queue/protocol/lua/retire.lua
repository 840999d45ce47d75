-- Removes a worker incarnation that computes nothing any more; what it still holds goes back without blame.
-- running -> queued
-- KEYS  1 workers (zset)
-- ARGV  1 incarnation
-- Returns 'OK'
local workers, incarnation = KEYS[1], ARGV[1]
local held = P .. 'held:' .. incarnation
for _, id in ipairs(redis.call('SMEMBERS', held)) do
  redis.call('SREM', held, id)
  local request = fields(P .. 'req:' .. id, {'state', 'owner'})
  if request.state == 'running' and request.owner == incarnation then requeue(id, '', '', {what = 'left'}) end
end
redis.call('ZREM', workers, incarnation)
local stage = redis.call('HGET', P .. 'w:' .. incarnation, 'ready')
if stage then stop_waiting(incarnation, stage) end
redis.call('DEL', P .. 'w:' .. incarnation, P .. 'ctl:' .. incarnation, P .. 'blocks:' .. incarnation, held)
return 'OK'
