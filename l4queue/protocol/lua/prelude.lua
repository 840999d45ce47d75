-- Shared by every script (prepended when scripts are loaded), by subject: foreign values, clock and numbers, sums and
-- wake-ups, records, memory, output, queues, endings, ledger and moves, blame.
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

-- == Sums and wake-ups ==

-- Calls of one batch share them: they are written once, by `finish` at its end (epilogue.lua).
local sums, arrivals, lives = {}, {}, {}

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

-- Adds an entry to a stream of wake-ups.
local function add_wakeup(name, id, ...)
  redis.call('XADD', P .. 'wake:' .. name, 'MAXLEN', '~', 64, '*', 'i', id, ...)
  live(P .. 'wake:' .. name, 3600000)
end

-- Tells a worker, if its lease is valid, that something waits in the queue of a stage; whether it is. `as` is 's' where
-- nobody else is told, 't' where it may steal that.
local function ring(incarnation, as, stage, id)
  local expiry = redis.call('ZSCORE', P .. 'workers', incarnation)
  if not expiry or tonumber(expiry) <= now_ms() then return false end
  add_wakeup('@' .. (string.match(incarnation, '^(.*):') or incarnation), id, as, stage)
  return true
end

-- Takes a worker off the ready ones of a stage; false where it was not among them.
local function leave_ready(incarnation, stage)
  redis.call('SREM', P .. 'thieves', incarnation)
  return redis.call('ZREM', P .. 'ready:' .. stage, incarnation) == 1
end

-- Wakes the lightest of a stage's ready workers, one for each of `num` requests; how many there were too few.
local function wake_ready(stage, id, num)
  while num > 0 do
    local lightest = redis.call('ZPOPMIN', P .. 'ready:' .. stage)[1]
    if not lightest then break end
    redis.call('SREM', P .. 'thieves', lightest)
    if ring(lightest, 's', stage, id) then num = num - 1 end
  end
  return num
end

-- Takes a worker off the ready ones because it takes nothing any more. If it was woken already, another one is.
local function stop_waiting(incarnation, stage)
  if leave_ready(incarnation, stage) or redis.call('EXISTS', P .. 'q:' .. stage) == 0 then return end
  wake_ready(stage, '', 1)
end

-- Wakes one worker for each new request of a queue. Where too few of the stage are ready, two that may steal it
-- are drawn, and all of an earlier release are told.
local function wake(stage, arrival)
  if string.find(stage, '^%d') then
    if wake_ready(stage, arrival.id, arrival.num) == 0 then return end
    for _, thief in ipairs(redis.call('SRANDMEMBER', P .. 'thieves', 2)) do
      if not ring(thief, 't', stage, arrival.id) then redis.call('SREM', P .. 'thieves', thief) end
    end
  end
  add_wakeup(stage, arrival.id)
end

local function finish()
  for key, sum in pairs(sums) do
    for field, by in pairs(sum) do redis.call('HINCRBY', key, field, int(by)) end
  end
  for stage, arrival in pairs(arrivals) do wake(stage, arrival) end
  for key, for_ms in pairs(lives) do redis.call('PEXPIRE', key, for_ms) end
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

-- Name of the field that no script can work on in the record of a live request; nil where the record is sound.
local function fault(id)
  if not string.find(id, '^[!-+%-.-~]+$') then return 'id' end
  local names = {'state', 'stage', 'score', 'epoch', 'offset', 'crashes', 'charge_tokens', 'charge_bytes', 'ttl_ms',
    'submitted_ms', 'prompt_tokens', 'deadline_ms', 'queued_ms', 'started_ms', 'first_token_ms', 'moved_ms'}
  local values = redis.call('HMGET', P .. 'req:' .. id, unpack(names))
  local state, stage = values[1], values[2]
  local score = string.find(values[3] or '', '^-?%d[%d.]*[eE]?[-+]?%d*$') and tonumber(values[3])
  local is_routed = state ~= 'submitted'
  for i = 4, #names do  -- the times from `deadline_ms` on need not be there
    local is_needed = i < 11 or i == 11 and is_routed
    if not whole(values[i]) and (values[i] or is_needed) then return names[i] end
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

-- == Endings ==

-- Ends a request: the only place that writes a terminal state. The caller has checked that it is live.
-- `text` is text held back until the end; `facts` is a flat list of record fields to store.
local function settle(id, state, text, facts)
  local record = P .. 'req:' .. id
  local request = fields(record, {'state', 'owner', 'stage', 'client', 'worker', 'entry', 'followers', 'charge_tokens',
    'charge_bytes', 'offset', 'ttl_ms', 'prompt_tokens', 'submitted_ms', 'queued_ms', 'started_ms', 'first_token_ms',
    'crashes', 'key_ttl_ms', 'deadline_ms', 'cached_tokens', 'blocks'})
  for _, name in ipairs({'charge_tokens', 'charge_bytes', 'offset', 'ttl_ms', 'prompt_tokens', 'submitted_ms',
    'queued_ms', 'started_ms', 'first_token_ms', 'crashes', 'key_ttl_ms'}) do
    if not whole(request[name]) then request[name] = false end
  end
  local now, offset, ttl = now_ms(), tonumber(request.offset or 0), tonumber(request.ttl_ms or 86400000)
  if request.deadline_ms then redis.call('ZREM', P .. 'deadlines', id) end
  if request.state == 'queued' and request.stage then
    dequeue(id, request.stage, (request.prompt_tokens or 0) + offset)
  end
  if request.state == 'submitted' and request.entry then
    redis.pcall('XACK', P .. 'in', 'd', request.entry)
    redis.pcall('XDEL', P .. 'in', request.entry)
  end
  if request.owner then redis.call('SREM', P .. 'held:' .. request.owner, id) end
  if request.state == 'running' and request.owner and state ~= 'done' and state ~= 'failed' then
    hint(request.owner, id)
  end
  redis.call('HDEL', record, 'owner', 'prompt', 'ids', 'entry', 'followers', 'blocks')
  redis.call('HSET', record, 'state', state, 'finished_ms', int(now), unpack(facts))
  redis.call('XADD', P .. 'out:' .. id, int(offset) .. '-1', 'e', state, 'x', text)
  redis.call('PEXPIRE', P .. 'out:' .. id, ttl)
  ttl = math.max(ttl, tonumber(request.key_ttl_ms or 0))
  redis.call('PEXPIRE', record, ttl)
  local key = string.match(id, '^(k%x+)%-%d+$')
  if key then redis.call('PEXPIRE', P .. 'key:' .. key, ttl) end
  count('live', -1)
  count('live_tokens', 0 - (request.charge_tokens or 0))
  count('live_bytes', 0 - (request.charge_bytes or 0))
  count(state, 1)
  count('output_tokens', offset)
  redis.call('XADD', P .. 'finished', 'MAXLEN', '~', 20000, '*', 'i', id, 's', state,
    'p', request.prompt_tokens or 0, 'o', int(offset), 'a', request.submitted_ms or int(now),
    'q', request.queued_ms or '', 'b', request.started_ms or '', 'f', request.first_token_ms or '', 'd', int(now),
    'g', request.stage or '', 'w', request.worker or '', 'c', request.crashes or 0, 'k', request.cached_tokens or '',
    unpack(request.blocks and {'h', request.blocks} or {}))
  if request.client and request.client ~= '' then
    local mail = P .. 'mail:' .. request.client
    redis.call('XADD', mail, 'MAXLEN', '~', 20000, '*', 'i', id, 's', state)
    live(mail, 3600000)
  end
  if #text > 1024 then
    tell(request.followers, id, offset, 'e', state)
  else
    tell(request.followers, id, offset, 'e', state, 'x', text)
  end
end

-- Ends a live request whose record no script can work on: its bytes, shortened, are a dead letter.
local function condemn(id, what)
  local record, parts = P .. 'req:' .. id, {}
  redis.call('ZREM', P .. 'deadlines', id)
  for i, part in ipairs(redis.call('HGETALL', record)) do
    parts[i] = string.sub(part, 1, 1000) .. (i % 2 == 1 and '=' or '\n')
  end
  local why = 'its record cannot be read: ' .. what
  bury(id, why, table.concat(parts))
  settle(id, 'failed', '', {'error', why, 'field', what, 'finish_reason', 'invalid'})
end

-- == Ledger and moves ==

-- Adds a line to a request's ledger, which `l4queue explain` tells. Ordinary steps leave none: the record has
-- their times. A request that is moved without end fills its ledger, not the server.
local function note(record, line)
  local had = redis.call('HGET', record, 'ledger') or ''
  if #had > 8000 then return end
  line.at_ms = now_ms()
  local text = cjson.encode(line) .. '\n'
  redis.call('HSET', record, 'ledger', had .. text)
  charge(record, #text)
end

-- Returns a running request to a queue, and says why in its ledger. With two crashes to its name it waits to be
-- run alone, and remembers its stage as `home`; with fewer it does not. `line` has what is to be said besides.
local function requeue(id, stage, score, line)
  local record, what = P .. 'req:' .. id, fault(id)
  if what then return condemn(id, what) end
  local request = fields(record, {'owner', 'crashes', 'prompt_tokens', 'offset', 'stage', 'score', 'worker', 'home'})
  if request.owner then redis.call('SREM', P .. 'held:' .. request.owner, id) end
  if stage == '' then stage = request.stage end
  if tonumber(request.crashes) >= 2 then
    stage = 'solo'
    if request.stage ~= 'solo' then redis.call('HSET', record, 'home', request.stage) end
  elseif stage == 'solo' then
    stage = request.home or '0'
  end
  if score == '' then score = request.score end
  redis.call('HDEL', record, 'owner', 'kv')
  redis.call('HSET', record, 'state', 'queued', 'stage', stage, 'score', score, 'moved_ms', int(now_ms()),
    'from', request.worker or '')
  count('requeued_' .. line.what, 1)
  line.worker, line.to, line.offset = request.worker or '', stage, tonumber(request.offset)
  note(record, line)
  enqueue(id, stage, score, tonumber(request.prompt_tokens) + tonumber(request.offset))
end

-- Notes for how long a moved request made no token, with the first one that its new worker writes.
local function resumed(record, moved_ms)
  if not moved_ms then return end
  redis.call('HDEL', record, 'moved_ms')
  if not whole(moved_ms) then return end
  local gap = math.max(0, now_ms() - moved_ms)  -- a clock may go back
  count('resumes', 1)
  count('resume_gap_ms', gap)
  note(record, {what = 'resumed', gap_ms = gap})
end

-- == Blame ==

-- Blames the loss of its worker on a running request. True when it has died alone `limit` times: then it is
-- dead; else the caller requeues it.
local function crashed(id, limit)
  local record = P .. 'req:' .. id
  local crashes = redis.call('HINCRBY', record, 'crashes', 1)
  if redis.call('HGET', record, 'stage') ~= 'solo' then return false end
  if redis.call('HINCRBY', record, 'solo_crashes', 1) < tonumber(limit) then return false end
  local why = 'worker lost ' .. crashes .. ' times while computing it, the last ' .. limit .. ' times alone'
  bury(id, why, '')
  settle(id, 'dead', '', {'error', why})
  return true
end
