-- Endings, moves and blame, shared by every script (behind the prelude): the ways of a request out of its state.

-- Removes the wake-up with which a worker got a request: it has the prompt.
local function forget_wakeup(request)
  if request.wakeup then redis.pcall('XDEL', P .. 'wake:@' .. (request.worker or ''), request.wakeup) end
end

-- == Endings ==

-- What the end of an output tells of the record, and what ending it needs.
local TOLD = {'body', 'epoch', 'offset', 'crashes', 'stage', 'plan', 'worker', 'prompt_tokens', 'cached_tokens',
  'max_tokens', 'submitted_ms', 'queued_ms', 'started_ms', 'first_token_ms', 'deadline_ms', 'placed'}
local ENDED = {'state', 'owner', 'client', 'entry', 'followers', 'charge_tokens', 'charge_bytes', 'ttl_ms',
  'key_ttl_ms', 'blocks', 'wakeup', unpack(TOLD)}

-- The last entry of an output: state and text, and what the record says, with the facts that are stored now. Until it
-- is packed its reader then needs nothing else. Not with a long body, to which many settings or metadata belong.
local function last_entry(request, state, text, facts)
  local entry = {'e', state, 'x', text}
  if state ~= 'done' or #(request.body or '') > 512 then return entry end
  for _, name in ipairs(TOLD) do
    if request[name] and request[name] ~= '' then entry[#entry + 1], entry[#entry + 2] = name, request[name] end
  end
  for i = 1, #facts, 2 do
    local is_told = facts[i] == 'finish_reason' or facts[i] == 'error' or facts[i] == 'field'
    if is_told and facts[i + 1] ~= '' then entry[#entry + 1], entry[#entry + 2] = facts[i], facts[i + 1] end
  end
  entry[#entry + 1], entry[#entry + 2] = 'finished_ms', int(now_ms())
  return entry
end

-- Ends a request: the only place that writes a terminal state. The caller has checked that it is live.
-- `text` is text held back until the end; `facts` is a flat list of record fields to store. `is_let_go`: its owner
-- holds it no more. `blocks` are keys of the prompt's blocks, packed, where the record has none: of either the first
-- ones are told, 4 kB.
local function settle(id, state, text, facts, is_let_go, blocks)
  local record = P .. 'req:' .. id
  local request = fields(record, ENDED)
  local last = last_entry(request, state, text, facts)
  for _, name in ipairs({'charge_tokens', 'charge_bytes', 'offset', 'ttl_ms', 'prompt_tokens', 'submitted_ms',
    'queued_ms', 'started_ms', 'first_token_ms', 'crashes', 'key_ttl_ms'}) do
    if not whole(request[name]) then request[name] = false end
  end
  local now, offset, ttl = now_ms(), tonumber(request.offset or 0), tonumber(request.ttl_ms or 86400000)
  blocks = request.blocks or blocks
  if request.deadline_ms then redis.call('ZREM', P .. 'deadlines', id) end
  if request.state == 'queued' and request.stage then
    dequeue(id, request.stage, (request.prompt_tokens or 0) + offset)
  end
  if request.state == 'submitted' and request.entry then
    redis.pcall('XACK', P .. 'in', 'd', request.entry)
    redis.pcall('XDEL', P .. 'in', request.entry)
  end
  if request.owner and not is_let_go then redis.call('SREM', P .. 'held:' .. request.owner, id) end
  if request.state == 'running' and request.owner and state ~= 'done' and state ~= 'failed' then
    hint(request.owner, id)
  end
  forget_wakeup(request)
  redis.call('HDEL', record, 'owner', 'prompt', 'ids', 'entry', 'followers', 'blocks', 'wakeup')
  redis.call('HSET', record, 'state', state, 'finished_ms', int(now), unpack(facts))
  redis.call('XADD', P .. 'out:' .. id, int(offset) .. '-1', unpack(last))
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
    unpack(blocks and {'h', string.sub(blocks, 1, 4096)} or {}))
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
  local record, request = P .. 'req:' .. id, checked(id, 'owner', 'worker', 'home', 'wakeup')
  local what = fault(id, request)
  if what then return condemn(id, what) end
  if request.owner then redis.call('SREM', P .. 'held:' .. request.owner, id) end
  if stage == '' then stage = request.stage end
  if tonumber(request.crashes) >= 2 then
    stage = 'solo'
    if request.stage ~= 'solo' then redis.call('HSET', record, 'home', request.stage) end
  elseif stage == 'solo' then
    stage = request.home or '0'
  end
  if score == '' then score = request.score end
  forget_wakeup(request)
  redis.call('HDEL', record, 'owner', 'kv', 'wakeup')
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

