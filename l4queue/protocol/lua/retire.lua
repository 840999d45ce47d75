-- Removes a worker incarnation that computes nothing any more; what it still holds goes back without blame.
-- running -> queued
-- KEYS  1 workers (zset)
-- ARGV  1 incarnation
-- Returns 'OK'
local incarnation = ARGV[1]
local held = P .. 'held:' .. incarnation
for _, id in ipairs(redis.call('SMEMBERS', held)) do
  redis.call('SREM', held, id)
  local request = fields(P .. 'req:' .. id, {'state', 'owner'})
  if request.state == 'running' and request.owner == incarnation then requeue(id, '', '', {what = 'left'}) end
end
remove_worker(incarnation)
return 'OK'
