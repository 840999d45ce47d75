-- Shared by every script (prepended when scripts are loaded): names, clock, queue moves, the one ending.
-- KEYS[1] always carries the hash tag; every key a script touches shares it, so one slot serves all.
-- A server out of memory refuses a script's first command that needs memory, but not those after a write
-- that needs none: scripts that drain the queue therefore begin with ZREM, SREM or DEL.
local P = string.match(KEYS[1], '^{[^}]*}:')
-- Scores from here on are those of background requests: l4queue/policy/queue_order.py.
local BACKGROUND = 2 ^ 50

local function now_ms()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

local function int(n)
  return string.format('%.0f', n)
end

-- Appends tokens to an output stream; the entry id is the offset after them. `logprobs` only where asked for.
local function append(out, upto, ids, text, logprobs)
  if logprobs then
    redis.call('XADD', out, int(upto) .. '-0', 't', ids, 'x', text, 'l', logprobs)
  else
    redis.call('XADD', out, int(upto) .. '-0', 't', ids, 'x', text)
  end
end

-- Puts a request into a stage queue and wakes its waiting workers. `tokens` is its current length.
local function enqueue(id, stage, score, tokens)
  if redis.call('ZADD', P .. 'q:' .. stage, score, id) == 1 then
    redis.call('HINCRBY', P .. 'backlog', stage, tokens)
  end
  redis.call('XADD', P .. 'wake:' .. stage, 'MAXLEN', '~', 64, '*', 'i', id)
  redis.call('PEXPIRE', P .. 'wake:' .. stage, 3600000)
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
  redis.call('PEXPIRE', P .. 'ctl:' .. owner, 600000)
end

-- Ends a request: the only place that writes a terminal state. The caller has checked that it is live.
-- `text` is text held back until the end; `facts` is a flat list of record fields to store.
local function settle(id, state, text, facts)
  local rk = P .. 'req:' .. id
  local v = redis.call('HMGET', rk, 'state', 'owner', 'stage', 'charge_tokens', 'charge_bytes', 'offset',
    'client', 'ttl_ms', 'prompt_tokens', 'submitted_ms', 'queued_ms', 'started_ms', 'first_token_ms',
    'worker', 'crashes', 'entry')
  local t, offset, ttl = now_ms(), tonumber(v[6]) or 0, tonumber(v[8])
  redis.call('ZREM', P .. 'deadlines', id)
  if v[1] == 'queued' then dequeue(id, v[3], tonumber(v[9]) + offset) end
  if v[1] == 'submitted' and v[16] then
    redis.call('XACK', P .. 'in', 'd', v[16])
    redis.call('XDEL', P .. 'in', v[16])
  end
  if v[2] then redis.call('SREM', P .. 'held:' .. v[2], id) end
  if v[1] == 'running' and state ~= 'done' and state ~= 'failed' then hint(v[2], id) end
  redis.call('HDEL', rk, 'owner', 'prompt', 'ids', 'entry')
  redis.call('HSET', rk, 'state', state, 'finished_ms', int(t), unpack(facts))
  redis.call('XADD', P .. 'out:' .. id, int(offset) .. '-1', 'e', state, 'x', text)
  redis.call('PEXPIRE', rk, ttl)
  redis.call('PEXPIRE', P .. 'out:' .. id, ttl)
  local counts = P .. 'counts'
  redis.call('HINCRBY', counts, 'live', -1)
  redis.call('HINCRBY', counts, 'live_tokens', -v[4])
  redis.call('HINCRBY', counts, 'live_bytes', -v[5])
  redis.call('HINCRBY', counts, state, 1)
  redis.call('HINCRBY', counts, 'output_tokens', offset)
  redis.call('XADD', P .. 'finished', 'MAXLEN', '~', 20000, '*', 'i', id, 's', state,
    'p', v[9] or 0, 'o', int(offset), 'a', v[10], 'q', v[11] or '', 'b', v[12] or '', 'f', v[13] or '',
    'd', int(t), 'g', v[3] or '', 'w', v[14] or '', 'c', v[15] or 0)
  if v[7] and v[7] ~= '' then
    local mail = P .. 'mail:' .. v[7]
    redis.call('XADD', mail, 'MAXLEN', '~', 20000, '*', 'i', id, 's', state)
    redis.call('PEXPIRE', mail, 3600000)
  end
end

-- Adds a line to a request's ledger, which `l4queue explain` tells. Ordinary steps leave none: the record has
-- their times. A request that is moved without end fills its ledger, not the server.
local function note(rk, line)
  local had = redis.call('HGET', rk, 'ledger') or ''
  if #had > 8000 then return end
  line.at_ms = now_ms()
  redis.call('HSET', rk, 'ledger', had .. cjson.encode(line) .. '\n')
end

-- Returns a running request to a queue, and says why in its ledger. With two crashes to its name it waits to be
-- run alone. `line` has what is to be said besides.
local function requeue(id, stage, score, line)
  local rk = P .. 'req:' .. id
  local v = redis.call('HMGET', rk, 'owner', 'crashes', 'prompt_tokens', 'offset', 'stage', 'score', 'worker')
  if v[1] then redis.call('SREM', P .. 'held:' .. v[1], id) end
  if tonumber(v[2]) >= 2 then stage = 'solo' end
  if stage == '' then stage = v[5] end
  if score == '' then score = v[6] end
  redis.call('HDEL', rk, 'owner', 'kv')
  redis.call('HSET', rk, 'state', 'queued', 'stage', stage, 'score', score, 'moved_ms', int(now_ms()),
    'from', v[7] or '')
  redis.call('HINCRBY', P .. 'counts', 'requeued_' .. line.what, 1)
  line.worker, line.to, line.offset = v[7] or '', stage, tonumber(v[4])
  note(rk, line)
  enqueue(id, stage, score, tonumber(v[3]) + tonumber(v[4]))
end

-- Notes for how long a moved request made no token, with the first one that its new worker writes.
local function resumed(rk, moved_ms)
  if not moved_ms then return end
  local gap = now_ms() - moved_ms
  redis.call('HDEL', rk, 'moved_ms')
  redis.call('HINCRBY', P .. 'counts', 'resumes', 1)
  redis.call('HINCRBY', P .. 'counts', 'resume_gap_ms', int(gap))
  note(rk, {what = 'resumed', gap_ms = gap})
end

-- Blames the loss of its worker on a running request. True when it has died alone `limit` times: then it is
-- dead; else the caller requeues it.
local function crashed(id, limit)
  local rk = P .. 'req:' .. id
  local crashes = redis.call('HINCRBY', rk, 'crashes', 1)
  if redis.call('HGET', rk, 'stage') ~= 'solo' then return false end
  if redis.call('HINCRBY', rk, 'solo_crashes', 1) < tonumber(limit) then return false end
  local why = 'worker lost ' .. crashes .. ' times while computing it, the last ' .. limit .. ' times alone'
  redis.call('XADD', P .. 'dead', 'MAXLEN', '~', 10000, '*', 'i', id, 'why', why, 'bytes', '')
  settle(id, 'dead', '', {'error', why})
  return true
end

-- The reply to a writer: true only for the owner of a running request under its current epoch.
local function is_owner(v, incarnation, epoch)
  return v[1] == 'running' and v[2] == incarnation and v[3] == epoch
end
