-- Ends live requests whose deadline has passed. submitted | queued | running -> expired
-- KEYS  1 deadlines (zset: id -> ms)
-- ARGV  1 most requests
-- Returns the number of requests that expired
local n = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(now_ms()), 'LIMIT', 0, ARGV[1])) do
  redis.call('ZREM', KEYS[1], id)
  local state = redis.call('HGET', P .. 'req:' .. id, 'state')
  if state == 'submitted' or state == 'queued' or state == 'running' then
    settle(id, 'expired', '', {'error', 'its deadline passed while it was ' .. state})
    n = n + 1
  end
end
return n
