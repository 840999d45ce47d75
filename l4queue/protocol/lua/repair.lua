-- Proves that a live record has an inbox entry, a queue entry or a lease, and mends it where it has none.
-- The other scripts keep this true; a repair is an alarm that something else wrote to these keys.
-- A record from the future is that of a clock that has gone back: its times, its deadline and its place in the order
-- go back as far, once. That is no alarm.
-- KEYS  1 req:<id>  2 in (stream)  3 workers (zset)
-- ARGV  1 id  2 least age of a submitted request that counts as forgotten (ms)
-- Returns 'FINE' | 'INBOX' | 'QUEUE' | 'LEASE' (what was missing) | 'RECORD' (it cannot be read: failed)
local record, inbox, workers = unpack(KEYS)
local id, forgotten_ms = ARGV[1], tonumber(ARGV[2])
local request = fields(record, {'state', 'owner', 'stage', 'score', 'prompt_tokens', 'offset', 'submitted_ms', 'entry'})

local function mended(what)
  count('repairs', 1)
  return what
end

-- Moves times, deadline and place in the order back by `ahead` ms.
local function move_back(ahead)
  redis.call('HDEL', record, '-')  -- needs no memory: a full server refuses a script whose first write does
  for _, name in ipairs({'submitted_ms', 'queued_ms', 'started_ms', 'first_token_ms', 'moved_ms', 'deadline_ms'}) do
    local ms = redis.call('HGET', record, name)
    if ms then redis.call('HSET', record, name, int(ms - ahead)) end
  end
  if redis.call('ZSCORE', P .. 'deadlines', id) then
    redis.call('ZINCRBY', P .. 'deadlines', int(-ahead), id)
  end
  if not request.score then return end
  request.score = string.format('%.17g', request.score - ahead)
  redis.call('HSET', record, 'score', request.score)
  if request.stage and redis.call('ZSCORE', P .. 'q:' .. request.stage, id) then
    redis.call('ZADD', P .. 'q:' .. request.stage, 'XX', request.score, id)
  end
end

if not is_live(request.state) then return 'FINE' end
local what = fault(id, checked(id))
if what then
  condemn(id, what)
  return mended('RECORD')
end
local ahead = (tonumber(request.submitted_ms) or 0) - now_ms()
if ahead > 1000 then move_back(ahead) end

if request.state == 'submitted' then
  if ahead > 1000 and request.entry then  -- the old one tells the time that was
    redis.pcall('XACK', inbox, 'd', request.entry)
    redis.call('XDEL', inbox, request.entry)
    redis.call('HSET', record, 'entry', redis.call('XADD', inbox, '*', 'i', id))
    return 'FINE'
  end
  if now_ms() - (tonumber(request.submitted_ms) or 0) < forgotten_ms then return 'FINE' end
  if request.entry and #redis.pcall('XRANGE', inbox, request.entry, request.entry) > 0 then return 'FINE' end
  redis.call('HDEL', record, 'entry')  -- needs no memory
  redis.call('HSET', record, 'entry', redis.call('XADD', inbox, '*', 'i', id))
  return mended('INBOX')
elseif request.state == 'queued' then
  if redis.call('ZSCORE', P .. 'q:' .. request.stage, id) then return 'FINE' end
  redis.call('HDEL', record, 'owner')  -- needs no memory
  enqueue(id, request.stage, request.score, tonumber(request.prompt_tokens) + tonumber(request.offset))
  return mended('QUEUE')
end
local owner = request.owner or ''
if redis.call('ZSCORE', workers, owner) and redis.call('SISMEMBER', P .. 'held:' .. owner, id) == 1 then
  return 'FINE'
end
redis.call('SREM', P .. 'held:' .. owner, id)
requeue(id, '', '', {what = 'repaired'})
return mended('LEASE')
