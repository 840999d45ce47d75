-- Shared by every script (prepended when scripts are loaded), by subject: foreign values, clock, plan and numbers, sums,
-- records, memory, output, queues. Endings and wake-ups come after it (endings.lua, wakeups.lua).
-- KEYS[1] always carries the hash tag; every key a script touches shares it, so one slot serves all.
-- A server out of memory refuses a script's first command that needs memory, but not those after a write
-- that needs none: scripts that drain the queue therefore begin with ZREM, SREM, HDEL or DEL.
local P = string.match(KEYS[1], '^{[^}]*}:')  -- prefix of all names

-- == Foreign values ==

-- Anybody who can write to Redis can write anything under our names. A command that fails on that sets it aside and
-- is run again; every script calls Redis this way.
local server, redis, heal = redis, {pcall = redis.pcall}, nil
local function is_spoiled(err)  -- a stream that takes no more entries, or not the one that is to follow
  return string.find(err, 'equal or smaller', 1, true) or string.find(err, 'last possible', 1, true)
end
function redis.call(...)
  local reply = server.pcall(...)
  if type(reply) ~= 'table' or not reply.err then return reply end
  heal(reply.err, ...)
  return server.call(...)  -- any other error is raised as ever
end

-- Adds a dead letter. Only the first bytes are kept.
local function bury(name, why, bytes)
  redis.call('XADD', P .. 'dead', 'MAXLEN', '~', 10000, '*', 'i', name, 'why', why, 'bytes', string.sub(bytes, 1, 16384))
end

-- Renames a key that is of another type than ours, or spoiled: foreign:<name>, for a week. False where it is sound.
local function set_aside(key, is_full)
  -- the types of our keys by the first part of their names
  local TYPES = {['in'] = 'stream', out = 'stream', pack = 'stream', wake = 'stream', ctl = 'stream', mail = 'stream',
    news = 'stream', plans = 'stream', decisions = 'stream', finished = 'stream', dead = 'stream', req = 'hash',
    w = 'hash', counts = 'hash', hist = 'hash', backlog = 'hash', foreground = 'hash', plan = 'hash', lost = 'hash',
    limit = 'hash', charged = 'hash',
    q = 'zset', ready = 'zset', thieves = 'set', workers = 'zset', deadlines = 'zset', results = 'zset', read = 'zset', keyed = 'zset', held = 'set', blocks = 'set', tick = 'string',
    packed = 'string', survey = 'string', given = 'string', key = 'string', memory = 'string', d = 'string',
    name = 'string', batch = 'hash', parts = 'hash',
    file = 'hash', batches = 'zset', files = 'zset', open = 'zset', files_due = 'zset'}
  local name = string.sub(key, #P + 1)
  local kind, ours = server.pcall('TYPE', key).ok, TYPES[string.match(name, '^[^:]+') or '']
  if not ours or kind == 'none' or kind == ours and not is_full then return false end
  local bytes = kind == 'string' and server.call('GETRANGE', key, 0, 16383) or server.call('DUMP', key)
  server.call('RENAME', key, P .. 'foreign:' .. name)
  server.call('PEXPIRE', P .. 'foreign:' .. name, 604800000)
  bury(name, is_full and 'no entry can be added any more' or 'a ' .. kind .. ' instead of a ' .. ours, bytes)
  return true
end

function heal(err, command, key, field)
  if string.find(err, 'WRONGTYPE', 1, true) then
    set_aside(key)
  elseif command == 'XADD' and is_spoiled(err) then
    set_aside(key, true)
  elseif command == 'HINCRBY' and (string.find(err, 'hash value is not an integer', 1, true)
      or string.find(err, 'would overflow', 1, true)) then
    local bytes = server.call('HGET', key, field)
    server.call('HDEL', key, field)
    bury(string.sub(key, #P + 1) .. ' ' .. field, 'not a number', bytes)
  end
end

-- == Clock, plan and numbers ==

local clock_ms  -- one moment for all that an EVALSHA does
local function now_ms()
  if not clock_ms then
    local t = redis.call('TIME')
    clock_ms = t[1] * 1000 + math.floor(t[2] / 1000)
  end
  return clock_ms
end

local function int(n)
  return string.format('%.0f', n)
end

local plan_version  -- one for all that an EVALSHA does
local function plan_in_force()
  plan_version = plan_version or redis.call('HGET', P .. 'plan', 'version') or '0'
  return plan_version
end

-- A record's number as a script may use it: a whole one that a double holds; nil else.
local function whole(value)
  return value and #value <= 15 and string.find(value, '^%d+$') and tonumber(value) or nil
end

-- == Sums ==

-- Calls of one batch share them: they are written once, by `finish` at its end (wakeups.lua, epilogue.lua).
local sums, arrivals, lives, read = {}, {}, {}, {}

-- Adds to a field of a hash.
local function add(key, field, by)
  local sum = sums[key] or {}
  sums[key], sum[field] = sum, (sum[field] or 0) + by
end

-- Adds to a counter of the deployment.
local function count(name, by)
  add(P .. 'counts', name, by)
end

-- Such a counter, of which this much is stored, with all that is to be added.
local function counted(name, stored)
  return (whole(stored) or 0) + ((sums[P .. 'counts'] or {})[name] or 0)
end

-- Lets a key expire `for_ms` after the last call that names it.
local function live(key, for_ms)
  lives[key] = for_ms
end

-- == Records ==

-- Some fields of a hash by their names; false for each that it lacks.
local function fields(key, names)
  local values, found = redis.call('HMGET', key, unpack(names)), {}
  for i = 1, #names do found[names[i]] = values[i] end
  return found
end

local function is_live(state)
  return state == 'submitted' or state == 'queued' or state == 'running'
end

-- The fence of writers: true only for the owner of a running request under its current epoch.
local function is_owner(request, incarnation, epoch)
  return request.state == 'running' and request.owner == incarnation and request.epoch == epoch
end

-- Notes that an id made of an idempotency key has been given, and says whether it had been before (or one like it: of
-- the hash 24 bits count). Such a key gets another id then: no id has two lives.
local function given(id)
  local bits = string.match(id, '^k(%x%x%x%x%x%x)%x+$')
  return bits and redis.call('SETBIT', P .. 'given', tonumber(bits, 16), 1) == 1
end

-- Fields by which a record is judged. From `deadline_ms` on they need not be there.
local CHECKED = {'state', 'stage', 'score', 'epoch', 'offset', 'crashes', 'charge_tokens', 'charge_bytes', 'ttl_ms',
  'submitted_ms', 'prompt_tokens', 'deadline_ms', 'queued_ms', 'started_ms', 'first_token_ms', 'moved_ms'}

-- Those, and more, of a record.
local function checked(id, ...)
  local names = {...}
  for i = 1, #CHECKED do names[#names + 1] = CHECKED[i] end
  return fields(P .. 'req:' .. id, names)
end

-- Name of the field that no script can work on in the record of a live request; nil where the record is sound.
-- `request` is what `checked` gave.
local function fault(id, request)
  if not string.find(id, '^[!-+%-.-~]+$') then return 'id' end
  local stage = request.stage
  local score = string.find(request.score or '', '^-?%d[%d.]*[eE]?[-+]?%d*$') and tonumber(request.score)
  local is_routed = request.state ~= 'submitted'
  for i = 4, #CHECKED do
    local value, is_needed = request[CHECKED[i]], i < 11 or i == 11 and is_routed
    if not whole(value) and (value or is_needed) then return CHECKED[i] end
  end
  if not is_routed then return nil end
  if not stage or not string.find(stage, '^[!-~]') or string.find(stage, '^[^@].*[^!-~]') then return 'stage' end
  if not score or score ~= score or math.abs(score) >= 2 ^ 53 then return 'score' end
  return nil
end

-- == Memory ==

-- Bytes that Redis uses for a record and its places in inbox, queue or results. A server that may not tell counts what
-- is written, and what a small hash costs beside.
local function footprint(record)
  local bytes = redis.pcall('MEMORY', 'USAGE', record, 'SAMPLES', 0)
  if type(bytes) == 'number' then return bytes + 150 end
  bytes = 650
  for _, value in ipairs(redis.call('HVALS', record)) do bytes = bytes + #value end
  return bytes
end

-- Bytes that Redis uses for the output of a running request, the first 256 tokens included.
local OUTPUT_BYTES = 4450

-- Counts more memory for a live request.
local function charge(record, bytes)
  redis.call('HINCRBY', record, 'charge_bytes', int(bytes))
  count('live_bytes', bytes)
end

-- == Output ==

-- Tells the followers of a request (client ids, split by spaces) that `upto` tokens exist or that it has ended. A client
-- that has gone is told nothing: only itself makes its news stream, and keeps it alive.
local function tell(followers, id, upto, ...)
  for client in string.gmatch(followers or '', '%S+') do
    redis.call('XADD', P .. 'news:' .. client, 'NOMKSTREAM', 'MAXLEN', '~', 50000, '*', 'i', id, 'u', int(upto), ...)
  end
end

-- The prompt tokens found in the prefix cache, of what a worker tells of that, as a field of the record; else nothing.
local function cached_fact(cached)
  local found = string.match(cached, '^%d+')
  if found then return 'cached_tokens', found end
end

-- Appends tokens to an output stream; the entry id is the offset after them. `logprobs` only where asked for, `cached`
-- with the first tokens, where known. Followers get the same, or only the offset where it is large: then they read
-- the output stream. False where the stream holds what no worker wrote, so that they cannot follow.
local function append(out, upto, ids, text, cached, logprobs, followers)
  local entry = {'t', ids, 'x', text}
  if logprobs then entry[5], entry[6] = 'l', logprobs end
  if cached ~= '' then entry[#entry + 1], entry[#entry + 2] = 'k', cached end
  local reply = redis.pcall('XADD', out, int(upto) .. '-0', unpack(entry))
  local err = type(reply) == 'table' and reply.err
  if err then
    if string.find(err, 'WRONGTYPE', 1, true) or is_spoiled(err) then return false end
    return server.call('XADD', out, int(upto) .. '-0', 't', ids)  -- raises what it was
  end
  if not followers then return true end
  local id = string.sub(out, #P + 5)
  if #ids + #text + #(logprobs or '') > 1024 then
    tell(followers, id, upto)
  else
    tell(followers, id, upto, unpack(entry))
  end
  return true
end

-- == Queues ==

-- Scores from here on are those of background requests: l4queue/policy/queue_order.py.
local BACKGROUND = 2 ^ 50

-- Puts a request into a stage queue and wakes a worker for it. `tokens` is its current length.
local function enqueue(id, stage, score, tokens)
  if redis.call('ZADD', P .. 'q:' .. stage, score, id) == 1 then
    redis.call('HINCRBY', P .. 'backlog', stage, tokens)
  end
  local arrival = arrivals[stage] or {num = 0}
  arrivals[stage], arrival.id, arrival.num = arrival, id, arrival.num + 1
end

-- Takes a request out of a stage queue; nothing happens when it is not there. An empty queue has no backlog,
-- whatever was added to it: a drift cannot last. The own queues of workers leave no trace, since names of workers
-- come and go without end.
local function dequeue(id, stage, tokens)
  if redis.call('ZREM', P .. 'q:' .. stage, id) == 0 then return end
  if redis.call('EXISTS', P .. 'q:' .. stage) == 1 then
    redis.call('HINCRBY', P .. 'backlog', stage, 0 - tokens)
  elseif string.sub(stage, 1, 1) == '@' then
    redis.call('HDEL', P .. 'backlog', stage)
  else
    redis.call('HSET', P .. 'backlog', stage, 0)
  end
end

-- Tells the owner of a running request to stop working on it. A hint: the fence is the truth.
local function hint(owner, id)
  redis.call('XADD', P .. 'ctl:' .. owner, 'MAXLEN', '~', 256, '*', 'i', id)
  live(P .. 'ctl:' .. owner, 600000)
end

