-- Returns the requests of workers whose lease ran out. running -> queued | dead
-- Blame is noted for an hour: a worker that comes back has it taken back (pardon).
-- Anybody may call it at any time. After a gap between two calls in which nobody could renew (Redis was away),
-- every lease lasts one lease longer. A worker that does not renew then gets this three times at most:
-- reapers that are merely slow must not keep the dead alive.
-- A clock that goes back leaves what lies in its future: leases are cut to their term from now, and when requests
-- last came to a stage to now. A worker of an older release tells no term: ten times the grace is allowed then.
-- KEYS  1 workers (zset)  2 tick (string: ms of the last call)
-- ARGV  1 most requests  2 gap that counts as an outage (ms)  3 grace (ms)  4 crashes alone that condemn
-- Returns {requeued, dead, graced (0|1)}
local workers, tick = unpack(KEYS)
local room, gap_ms, grace_ms, max_crashes = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms()
local num_requeued, num_dead, graced = 0, 0, 0

-- After an outage: every lease that would have run out lasts one grace longer, three times at most.
local function give_grace()
  for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', workers, '-inf', int(now + grace_ms))) do
    if redis.call('HINCRBY', P .. 'w:' .. incarnation, 'graced', 1) <= 3 then
      redis.call('ZADD', workers, 'XX', int(now + grace_ms), incarnation)
      graced = 1
    end
  end
end

-- After a clock went back: leases end within their term from now, and nothing came to a stage after now.
local function cut_the_future()
  for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', workers, '(' .. int(now + grace_ms + 1000), '+inf')) do
    local told = whole(redis.call('HGET', P .. 'w:' .. incarnation, 'lease_ms')) or 10 * grace_ms
    redis.call('ZADD', workers, 'XX', 'LT', int(now + math.max(told, grace_ms)), incarnation)
  end
  local stamps = redis.call('HGETALL', P .. 'foreground')
  for i = 1, #stamps, 2 do
    local stage, came_ms = stamps[i], whole(stamps[i + 1])
    if not came_ms then
      redis.call('HDEL', P .. 'foreground', stage)
      bury('foreground ' .. stage, 'not a number', stamps[i + 1])
    elseif came_ms > now + 1000 then
      redis.call('HSET', P .. 'foreground', stage, int(now))
    end
  end
end

-- Returns one request of a worker that is lost, unless it is somebody else's by now.
local function take_back(id, incarnation)
  local request = fields(P .. 'req:' .. id, {'state', 'owner', 'stage'})
  if request.state ~= 'running' or request.owner ~= incarnation then return end
  if crashed(id, max_crashes) then
    num_dead = num_dead + 1
    return
  end
  redis.call('HSET', P .. 'lost:' .. incarnation, id, request.stage == 'solo' and '1' or '0')
  redis.call('PEXPIRE', P .. 'lost:' .. incarnation, 3600000)
  requeue(id, '', '', {what = 'lost'})
  num_requeued = num_requeued + 1
end

local last = whole(redis.call('GET', tick)) or now
redis.call('DEL', tick)  -- needs no memory: a full server refuses a script whose first write does
redis.call('SET', tick, int(now))
if now - last > gap_ms then give_grace() end
cut_the_future()
for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', workers, '-inf', int(now))) do
  local held = P .. 'held:' .. incarnation
  while room > 0 do
    local id = redis.call('SPOP', held)
    if not id then break end
    room = room - 1
    take_back(id, incarnation)
  end
  if redis.call('SCARD', held) == 0 then remove_worker(incarnation) end
end
return {num_requeued, num_dead, graced}
