-- Returns the requests of workers whose lease ran out. running -> queued | dead
-- What is blamed on a request is noted for an hour: a worker that comes back has it taken back (pardon).
-- Anybody may call it at any time. After a gap between two calls in which nobody could renew (Redis was away),
-- every lease lasts one lease longer. A worker that does not renew then gets this three times at most:
-- reapers that are merely slow must not keep the dead alive.
-- A clock that goes back leaves what lies in its future: leases are cut to their term from now, and when requests
-- last came to a stage to now. A worker of an older release tells no term: ten times the grace is allowed then.
-- KEYS  1 workers (zset)  2 tick (string: ms of the last call)
-- ARGV  1 most requests  2 gap that counts as an outage (ms)  3 grace (ms)  4 crashes alone that condemn
-- Returns {requeued, dead, graced (0|1)}
local t = now_ms()
local last = whole(redis.call('GET', KEYS[2])) or t
redis.call('DEL', KEYS[2])
redis.call('SET', KEYS[2], int(t))
local graced = 0
if t - last > tonumber(ARGV[2]) then
  for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(t + ARGV[3]))) do
    if redis.call('HINCRBY', P .. 'w:' .. incarnation, 'graced', 1) <= 3 then
      redis.call('ZADD', KEYS[1], 'XX', int(t + ARGV[3]), incarnation)
      graced = 1
    end
  end
end
for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. int(t + ARGV[3] + 1000), '+inf')) do
  local told = whole(redis.call('HGET', P .. 'w:' .. incarnation, 'lease_ms')) or 10 * ARGV[3]
  redis.call('ZADD', KEYS[1], 'XX', 'LT', int(t + math.max(told, ARGV[3])), incarnation)
end
local stamps = redis.call('HGETALL', P .. 'foreground')
for i = 1, #stamps, 2 do
  if not whole(stamps[i + 1]) then
    redis.call('HDEL', P .. 'foreground', stamps[i])
    bury('foreground ' .. stamps[i], 'not a number', stamps[i + 1])
  elseif tonumber(stamps[i + 1]) > t + 1000 then
    redis.call('HSET', P .. 'foreground', stamps[i], int(t))
  end
end
local room, requeued, dead = tonumber(ARGV[1]), 0, 0
for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(t))) do
  local held = P .. 'held:' .. incarnation
  while room > 0 do
    local id = redis.call('SPOP', held)
    if not id then break end
    room = room - 1
    local v = redis.call('HMGET', P .. 'req:' .. id, 'state', 'owner', 'stage')
    if v[1] == 'running' and v[2] == incarnation then
      if crashed(id, ARGV[4]) then
        dead = dead + 1
      else
        redis.call('HSET', P .. 'lost:' .. incarnation, id, v[3] == 'solo' and '1' or '0')
        redis.call('PEXPIRE', P .. 'lost:' .. incarnation, 3600000)
        requeue(id, '', '', {what = 'lost'})
        requeued = requeued + 1
      end
    end
  end
  if redis.call('SCARD', held) == 0 then
    redis.call('ZREM', KEYS[1], incarnation)
    redis.call('DEL', P .. 'w:' .. incarnation, P .. 'ctl:' .. incarnation, held)
  end
end
return {requeued, dead, graced}
