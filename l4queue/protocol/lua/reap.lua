-- Returns the requests of workers whose lease ran out. running -> queued | dead
-- Anybody may call it at any time. After a gap in which nobody could renew (Redis was away), every lease
-- gets one lease of grace instead.
-- KEYS  1 workers (zset)  2 tick (string: ms of the last call)  3 dead (stream)
-- ARGV  1 most requests  2 gap that counts as an outage (ms)  3 grace (ms)  4 crashes alone that condemn
-- Returns {requeued, dead, graced (0|1)}
local t = now_ms()
local last = tonumber(redis.call('GET', KEYS[2]) or t)
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], int(t))
local late = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(t))
if t - last > tonumber(ARGV[2]) then
  for _, incarnation in ipairs(late) do redis.call('ZADD', KEYS[1], 'XX', int(t + ARGV[3]), incarnation) end
  return {0, 0, 1}
end
local room, requeued, dead = tonumber(ARGV[1]), 0, 0
for _, incarnation in ipairs(late) do
  local held = P .. 'held:' .. incarnation
  while room > 0 do
    local id = redis.call('SPOP', held)
    if not id then break end
    room = room - 1
    local rk = P .. 'req:' .. id
    local v = redis.call('HMGET', rk, 'state', 'owner', 'stage')
    if v[1] == 'running' and v[2] == incarnation then
      local crashes = redis.call('HINCRBY', rk, 'crashes', 1)
      if v[3] == 'solo' and redis.call('HINCRBY', rk, 'solo_crashes', 1) >= tonumber(ARGV[4]) then
        local why = 'worker lost ' .. crashes .. ' times while computing it, the last ' .. ARGV[4] .. ' times alone'
        redis.call('XADD', KEYS[3], 'MAXLEN', '~', 10000, '*', 'i', id, 'why', why, 'bytes', '')
        settle(id, 'dead', '', {'error', why})
        dead = dead + 1
      else
        requeue(id, '', '')
        requeued = requeued + 1
      end
    end
  end
  if redis.call('SCARD', held) == 0 then
    redis.call('ZREM', KEYS[1], incarnation)
    redis.call('DEL', P .. 'w:' .. incarnation, P .. 'ctl:' .. incarnation, held)
  end
end
return {requeued, dead, 0}
