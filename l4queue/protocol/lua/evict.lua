-- Keeps what has ended within its bound: what expired is no longer counted; beyond the bound results go early, those
-- first that their clients have read (mark_read), then those that would expire first, and after them the idempotency keys of results that have gone.
-- A request with an idempotency key leaves its record, so that the key stays known; others leave nothing.
-- KEYS  1 results (zset: "<id> <bytes>" -> end of the output, ms)  2 keyed (zset: the same -> end of the record, ms)
-- ARGV  1 bound (bytes)  2 most requests  3... requests that have ended and go now, with their keys: their clients have
--       what they want of them
-- Returns {results that went early, keys forgotten early, bytes kept, 1 when there is more to do at once, how many of
--         those named were there}
local results, keyed = unpack(KEYS)
local max_bytes, room = tonumber(ARGV[1]), tonumber(ARGV[2])
local counts, read, now = P .. 'counts', P .. 'read', now_ms()
local num_dropped, num_forgotten, num_discarded = 0, 0, 0

-- Takes one out of `results` or `keyed`, and its bytes off the count. Returns its id.
local function uncount(set, member)
  redis.call('ZREM', set, member)
  redis.call('ZREM', read, member)
  local id, bytes = string.match(member, '^(.*) (%d+)$')
  if whole(bytes) then redis.call('HINCRBY', counts, 'result_bytes', -bytes) end
  return id or ''
end

-- A member may be somebody else's: what it names and has not ended stays.
local function is_live(record)
  return redis.call('EXISTS', record) == 1 and redis.call('HEXISTS', record, 'finished_ms') == 0
end

-- Removes the output. What stays of a request with an idempotency key is counted until it expires, too.
local function drop(id, is_early)
  local record = P .. 'req:' .. id
  if is_live(record) then return end
  redis.call('UNLINK', P .. 'out:' .. id)
  local is_keyed, is_there = redis.call('HEXISTS', record, 'key_ttl_ms') == 1, redis.call('EXISTS', record) == 1
  if not is_there then return end
  if is_early then num_dropped = num_dropped + 1 end
  if not is_keyed then
    redis.call('UNLINK', record)
    return
  end
  for _, name in ipairs(redis.call('HKEYS', record)) do
    if name == 'body' or string.match(name, '^why') or string.match(name, '^ledger') then
      redis.call('HDEL', record, name)
    end
  end
  if is_early then redis.call('HSET', record, 'dropped_ms', int(now)) end
  local bytes = int(footprint(record))
  redis.call('HSET', record, 'kept_bytes', bytes)
  redis.call('ZADD', keyed, int(now + redis.call('PTTL', record)), id .. ' ' .. bytes)
  redis.call('HINCRBY', counts, 'result_bytes', bytes)
end

-- Removes all of a request that has ended, its idempotency key included.
local function discard(id)
  local record = P .. 'req:' .. id
  local request = fields(record, {'finished_ms', 'kept_bytes'})
  if not request.finished_ms then return end
  redis.call('UNLINK', record, P .. 'out:' .. id)
  local member = id .. ' ' .. (request.kept_bytes or '')
  for _, set in ipairs({results, keyed}) do
    if redis.call('ZSCORE', set, member) then uncount(set, member) end
  end
  given(id)
  num_discarded = num_discarded + 1
end

local function kept_bytes()
  return tonumber(redis.call('HGET', counts, 'result_bytes')) or 0
end

local function is_beyond()
  return room > 0 and kept_bytes() > max_bytes
end

for i = 3, #ARGV do discard(ARGV[i]) end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', results, '-inf', int(now), 'LIMIT', 0, room)) do
  pcall(drop, uncount(results, member), false)  -- a foreign key in this place stays as it is
  room = room - 1
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', keyed, '-inf', int(now), 'LIMIT', 0, room)) do
  uncount(keyed, member)
  room = room - 1
end
while is_beyond() do
  local member = redis.call('ZRANGE', read, 0, 0)[1] or redis.call('ZRANGE', results, 0, 0)[1]
  if not member then break end
  redis.call('ZREM', read, member)
  if redis.call('ZSCORE', results, member) then pcall(drop, uncount(results, member), true) end
  room = room - 1
end
while is_beyond() do
  local member = redis.call('ZRANGE', keyed, 0, 0)[1]
  if not member then break end
  local record = P .. 'req:' .. uncount(keyed, member)
  if not is_live(record) then redis.call('UNLINK', record) end
  num_forgotten, room = num_forgotten + 1, room - 1
end
if num_dropped > 0 then redis.call('HINCRBY', counts, 'results_dropped', num_dropped) end
return {num_dropped, num_forgotten, kept_bytes(), room > 0 and 0 or 1, num_discarded}
