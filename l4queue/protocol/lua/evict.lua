-- Keeps what has ended within its bound: what expired is no longer counted; beyond the bound results go early, those
-- first that would expire first, and after them the idempotency keys of results that have gone.
-- A request with an idempotency key leaves its record, so that the key stays known; others leave nothing.
-- KEYS  1 results (zset: "<id> <bytes>" -> end of the output, ms)  2 keyed (zset: the same -> end of the record, ms)
-- ARGV  1 bound (bytes)  2 most requests  3... requests that have ended and go now, with their keys: their clients have
--       what they want of them
-- Returns {results that went early, keys forgotten early, bytes kept, 1 when there is more to do at once, how many of
--         those named were there}
local counts, t = P .. 'counts', now_ms()
local room, dropped, forgotten = tonumber(ARGV[2]), 0, 0

local function uncount(set, member)
  redis.call('ZREM', set, member)
  local id, bytes = string.match(member, '^(.*) (%d+)$')
  if whole(bytes) then redis.call('HINCRBY', counts, 'result_bytes', -bytes) end
  return id or ''
end

-- A member may be somebody else's: what it names and has not ended stays.
local function is_live(rk)
  return redis.call('EXISTS', rk) == 1 and redis.call('HEXISTS', rk, 'finished_ms') == 0
end

-- Removes the output. What stays of a request with an idempotency key is counted until it expires, too.
local function drop(id, is_early)
  local rk = P .. 'req:' .. id
  if is_live(rk) then return end
  redis.call('UNLINK', P .. 'out:' .. id)
  local is_keyed, is_there = redis.call('HEXISTS', rk, 'key_ttl_ms') == 1, redis.call('EXISTS', rk) == 1
  if not is_there then return end
  if is_early then dropped = dropped + 1 end
  if not is_keyed then
    redis.call('UNLINK', rk)
    return
  end
  for _, name in ipairs(redis.call('HKEYS', rk)) do
    if name == 'body' or string.match(name, '^why') or string.match(name, '^ledger') then
      redis.call('HDEL', rk, name)
    end
  end
  if is_early then redis.call('HSET', rk, 'dropped_ms', int(t)) end
  local bytes = int(footprint(rk))
  redis.call('HSET', rk, 'kept_bytes', bytes)
  redis.call('ZADD', KEYS[2], int(t + redis.call('PTTL', rk)), id .. ' ' .. bytes)
  redis.call('HINCRBY', counts, 'result_bytes', bytes)
end

local function discard(id)
  local rk = P .. 'req:' .. id
  local v = redis.call('HMGET', rk, 'finished_ms', 'kept_bytes')
  if not v[1] then return 0 end
  redis.call('UNLINK', rk, P .. 'out:' .. id)
  local member = id .. ' ' .. (v[2] or '')
  for _, set in ipairs({KEYS[1], KEYS[2]}) do
    if redis.call('ZSCORE', set, member) then uncount(set, member) end
  end
  given(id)
  return 1
end

local discarded = 0
for i = 3, #ARGV do discarded = discarded + discard(ARGV[i]) end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', int(t), 'LIMIT', 0, room)) do
  pcall(drop, uncount(KEYS[1], member), false)  -- a foreign key in this place stays as it is
  room = room - 1
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', int(t), 'LIMIT', 0, room)) do
  uncount(KEYS[2], member)
  room = room - 1
end
local function is_beyond()
  return room > 0 and (tonumber(redis.call('HGET', counts, 'result_bytes')) or 0) > tonumber(ARGV[1])
end
while is_beyond() do
  local member = redis.call('ZRANGE', KEYS[1], 0, 0)[1]
  if not member then break end
  pcall(drop, uncount(KEYS[1], member), true)
  room = room - 1
end
while is_beyond() do
  local member = redis.call('ZRANGE', KEYS[2], 0, 0)[1]
  if not member then break end
  local rk = P .. 'req:' .. uncount(KEYS[2], member)
  if not is_live(rk) then redis.call('UNLINK', rk) end
  forgotten, room = forgotten + 1, room - 1
end
if dropped > 0 then redis.call('HINCRBY', counts, 'results_dropped', dropped) end
return {dropped, forgotten, tonumber(redis.call('HGET', counts, 'result_bytes')) or 0, room > 0 and 0 or 1,
  discarded}
