-- Leases waiting requests to a worker, in serving order, while they fit its room. queued -> running
-- The same nonce hands the same grants back, so a lost reply costs nothing.
-- KEYS  1 q:<stage> (zset)  2 w:<incarnation> (hash)  3 held:<incarnation> (set)  4 workers (zset)
-- ARGV  1 incarnation  2 nonce  3 most requests  4 room (KV tokens)  5 reserve per request (tokens)
--       6 worker id  7 stage taken from  8 prefill budget (tokens; the request that exceeds it is the last)
--       9 '1' when the worker is idle: the first request fits whatever its size
--       10 sharers: workers that pull from this queue; of more than one, each takes half its share at a time,
--       so that whoever wakes first leaves work to the others
--       11 the taker's own stage: what it takes from another one is stolen; what was queued for this worker alone
--       (@<worker id>) belongs to its stage from now on  12 predicted benefit (ms)  13 predicted cost (ms) of stealing
--       14 longest request to take (tokens), but for the first of an idle worker
--       15 ms since the last other request came to the own stage for which background requests are held back
--       16 most of them while they are  17 longest of them while they are (tokens), but for the first of an idle worker
--       18 ms after its place in the order at which a background request counts as any other
--       19 work before the worker (ms): where nothing is left here for it, it is ready from now on and the next
--       arrival wakes the one with the least ('' = it does not wait for that)
--       20 what a request and 21 a token of it add to that (ms)  22 '1' where it may steal from other stages
--       23 '1' = by choice: only those named are taken, and the others are for others
--       24.. requests that are taken instead of those at the head, each: id, tokens of it that need no prefill here,
--       why this worker
-- Background requests (score from BACKGROUND on) have the place of their score less BACKGROUND. Where they may not
-- be taken they are passed over, and hold up nobody.
-- A request whose deadline has passed ends as expired instead of being computed.
-- What a worker with no room for it leaves at the head wakes another that is ready.
-- Returns {'LOST'} when the incarnation is not registered or its lease has run out (what it takes then would
--         be reaped and blamed at once; a replay is answered all the same), else {'OK' | 'READY', grant...} where a grant is
--         {id, epoch, body, packed ids, offset, prompt_tokens, crashes, score, submitted_ms, deadline_ms, stage, from, kv,
--         '1' for background}
local queue, worker, held, workers = unpack(KEYS)
local incarnation, nonce, worker_id, stage, own_stage = ARGV[1], ARGV[2], ARGV[6], ARGV[7], ARGV[11]
local most, room, reserve, prefill = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[8])
local is_idle, sharers, longest = ARGV[9] == '1', tonumber(ARGV[10]), tonumber(ARGV[14])
local benefit_ms, cost_ms = tonumber(ARGV[12]), tonumber(ARGV[13])
local held_back_ms, background, longest_background = tonumber(ARGV[15]), tonumber(ARGV[16]), tonumber(ARGV[17])
local backlog_ms, request_ms, token_ms = tonumber(ARGV[19]), tonumber(ARGV[20]), tonumber(ARGV[21])
local may_steal, is_by_choice = ARGV[22] == '1', ARGV[23] == '1'
local now = now_ms()
local overdue = now - tonumber(ARGV[18])
local is_solo, is_private = stage == 'solo', string.sub(stage, 1, 1) == '@'
local is_stolen = not is_solo and not is_private and own_stage ~= stage
if is_solo then most = math.min(1, most) end
local reply, taken, shares, named = {'OK'}, {}, {}, {}
for i = 24, #ARGV, 3 do named[#named + 1] = {ARGV[i], tonumber(ARGV[i + 1]), ARGV[i + 2]} end

-- == Order: which requests come next ==

-- Whether a request of this score counts as background: it stands behind BACKGROUND and is not overdue.
local function is_background(score)
  return tonumber(score) >= BACKGROUND and score - BACKGROUND > overdue
end

-- Sets the limits of this take: those of background requests, and of several sharers' two classes half a share each.
local function set_limits()
  if now - (whole(redis.call('HGET', P .. 'foreground', own_stage)) or 0) >= held_back_ms then
    background, longest_background = most, longest
  end
  shares = {most, most}
  if sharers > 1 then
    local num = redis.call('ZCOUNT', queue, int(BACKGROUND), '+inf')
    local others = redis.call('ZCARD', queue) - num
    shares = {math.min(most, math.ceil(others / (2 * sharers))), math.min(most, math.ceil(num / (2 * sharers)))}
  end
end

-- Those of the named ones that wait here, in the same form, and what was said of each.
local function named_ones()
  local found = {}
  for _, one in ipairs(named) do
    local score = redis.call('ZSCORE', queue, one[1])
    if score then found[#found + 1] = {one[1], 1, is_background(score), one[2], one[3]} end
  end
  return found
end

-- The next `n` that may be taken, in order: {id, class (1 others, 2 background), whether it counts as background}.
local function next_in_order(n)
  if is_by_choice then return named_ones() end
  local upto = background > 0 and '+inf' or int(BACKGROUND + overdue)
  local a = redis.call('ZRANGEBYSCORE', queue, '-inf', '(' .. int(BACKGROUND), 'WITHSCORES',
    'LIMIT', 0, math.min(n, shares[1]))
  local b = redis.call('ZRANGEBYSCORE', queue, int(BACKGROUND), upto, 'WITHSCORES',
    'LIMIT', 0, math.min(n, shares[2]))
  local merged, i, j = {}, 1, 1
  while a[i] or b[j] do
    if not a[i] or b[j] and b[j + 1] - BACKGROUND < tonumber(a[i + 1]) then
      merged[#merged + 1] = {b[j], 2, is_background(b[j + 1])}
      j = j + 2
    else
      merged[#merged + 1] = {a[i], 1, false}
      i = i + 2
    end
  end
  return merged
end

-- == Fit: whether a request can be taken ==

-- Drops one that nobody can compute: an entry left behind, an unreadable record, one that is too late.
local function drop(id, request)
  if request.state ~= 'queued' or request.stage ~= stage then
    dequeue(id, stage, 0)
    return true
  end
  local what = fault(id, request) or (not request.body or not request.ids or #request.ids % 4 > 0) and 'ids'
  if what then
    condemn(id, what)
    return true
  end
  if request.deadline_ms and tonumber(request.deadline_ms) <= now then
    settle(id, 'expired', '', {'error', 'its deadline passed while it was queued'})
    return true
  end
  return false
end

-- Whether a request of this length fits what is left; the first one of an idle worker always does.
local function fits(tokens, is_back)
  if #taken > 0 and prefill <= 0 then return false end
  if #taken == 0 and is_idle then return true end
  if is_back and tokens > longest_background then return false end
  return room >= tokens + reserve and tokens <= longest
end

-- == Lease: the request is the worker's ==

-- A record, with all that a grant tells.
local function granted(id)
  return checked(id, 'owner', 'body', 'ids', 'from', 'kv')
end

-- Adds a grant to the reply.
local function grant(id, request)
  reply[#reply + 1] = {id, request.epoch, request.body, request.ids, request.offset, request.prompt_tokens,
    request.crashes, request.score, request.submitted_ms, request.deadline_ms or '0', request.stage,
    request.from or '', request.kv or '', is_background(request.score) and '1' or ''}
end

-- Moves a request from the queue to the worker, under the next epoch. `found` tokens of it need no prefill there.
local function lease(id, request, tokens, found, why)
  local record = P .. 'req:' .. id
  room, prefill = room - tokens - reserve, prefill - math.max(1, tokens - (found or 0))
  if backlog_ms then backlog_ms = backlog_ms + request_ms + token_ms * tokens end
  begin_lease(id, request, stage, tokens, incarnation, worker_id)
  if why then redis.call('HSET', record, 'placed', why) end
  if is_private then
    redis.call('HSET', record, 'stage', own_stage)
    request.stage = own_stage
  end
  if is_stolen then
    count('steals_waiting', 1)
    note(record, {what = 'stolen', worker = worker_id, from = stage, to = own_stage, benefit_ms = benefit_ms,
      cost_ms = cost_ms})
  elseif request.epoch ~= '1' then
    note(record, {what = 'taken', worker = worker_id, from = stage})
  end
  if is_solo then redis.call('HSET', worker, 'alone', id) end
  taken[#taken + 1] = id .. ',' .. request.epoch
  grant(id, request)
end

-- == Ready: the next arrival wakes the worker ==

-- Whether it is ready from now on: with room, and with nothing left here that it may take.
local function become_ready(num_left)
  local has_room = #taken < most and (#taken == 0 or prefill > 0)
  if not has_room or num_left > 0 and not is_by_choice then return false end
  redis.call('ZADD', P .. 'ready:' .. own_stage, string.format('%.3f', backlog_ms), incarnation)
  if may_steal then redis.call('SADD', P .. 'thieves', incarnation) end
  return true
end

-- Notes what a worker that runs nothing has room for: whenever it runs nothing, a request may come with the wake-up.
local function become_eager(was_eager)
  if not is_idle or #taken > 0 or is_by_choice then return end
  local told = string.format('%.0f %.0f %.6f %.6f', most, prefill, request_ms, token_ms)
  if was_eager ~= told then redis.call('HSET', worker, 'eager', told) end
end

-- Ends the take of a stage's queue by its own worker: that is ready, or wakes another for what it leaves.
local function wait_for_more(was_ready_for, was_eager)
  if was_ready_for and was_ready_for ~= own_stage then stop_waiting(incarnation, was_ready_for) end
  local upto = background > 0 and '+inf' or int(BACKGROUND + overdue)
  local num_left = redis.call('ZCOUNT', queue, '-inf', upto)
  if become_ready(num_left) then
    reply[1] = 'READY'
    become_eager(was_eager)
    if was_ready_for ~= own_stage then redis.call('HSET', worker, 'ready', own_stage) end
    return
  end
  leave_ready(incarnation, own_stage)
  if not is_by_choice then wake_ready(own_stage, '', math.min(1, num_left)) end
end

-- == The take ==

local expiry = redis.call('ZSCORE', workers, incarnation)
if not expiry then return {'LOST'} end
local last = fields(worker, {'nonce', 'grants', 'alone', 'ready', 'eager'})
if last.nonce == nonce then  -- a repeat: the same grants, as far as they are still the worker's
  for id, epoch in string.gmatch(last.grants or '', '([^ ,]+),(%d+)') do
    local request = granted(id)
    if is_owner(request, incarnation, epoch) then grant(id, request) end
  end
  return reply
end
if tonumber(expiry) <= now then return {'LOST'} end
if last.alone and redis.call('SISMEMBER', held, last.alone) == 1 then return reply end
if is_solo and redis.call('SCARD', held) > 0 then return reply end
redis.call('HDEL', worker, 'alone')  -- needs no memory, too: a full server refuses a script whose first write does
set_limits()
local passes, is_full = 0, false
repeat  -- again for those that were only dropped; bounded, as nobody else is served meanwhile
  local gone, left = 0, most - #taken
  for _, entry in ipairs(next_in_order(left)) do
    local id, class, is_back, found, why = unpack(entry)
    if left <= 0 then break end
    if not is_back or background > 0 then
      local request = granted(id)
      local tokens = (tonumber(request.prompt_tokens) or 0) + (tonumber(request.offset) or 0)
      if drop(id, request) then
        gone, left = gone + 1, left - 1
      elseif fits(tokens, is_back) then
        lease(id, request, tokens, found, why)
        left, shares[class] = left - 1, shares[class] - 1
        if is_back then background = background - 1 end
      elseif is_back then
        background = 0  -- passed over, as are those behind it
      else
        is_full = true
        break
      end
    end
  end
  passes = passes + 1
until gone == 0 or is_full or #taken >= most or passes == 16
-- a take that found nothing writes nothing, which a durable server would have to bring to its disk
if #taken > 0 then redis.call('HSET', worker, 'nonce', nonce, 'grants', table.concat(taken, ' ')) end
if backlog_ms then wait_for_more(last.ready, last.eager) end
return reply
