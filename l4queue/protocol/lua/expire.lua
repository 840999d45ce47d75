-- Ends live requests whose deadline has passed. submitted | queued | running -> expired
-- KEYS  1 deadlines (zset: id -> ms)
-- ARGV  1 most requests
-- Returns the number of requests that expired
local deadlines, most = KEYS[1], ARGV[1]
local num_expired = 0
for _, id in ipairs(redis.call('ZRANGEBYSCORE', deadlines, '-inf', int(now_ms()), 'LIMIT', 0, most)) do
  redis.call('ZREM', deadlines, id)
  local state = redis.call('HGET', P .. 'req:' .. id, 'state')
  if is_live(state) then
    settle(id, 'expired', '', {'error', 'its deadline passed while it was ' .. state})
    num_expired = num_expired + 1
  end
end
return num_expired
