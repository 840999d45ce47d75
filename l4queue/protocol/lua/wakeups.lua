-- Leases and wake-ups of workers, shared by every script (behind the prelude): who gets a request or is told that one
-- waits, and the end of a batch, which does both.

-- == Leases ==

-- Moves a waiting request to a worker, under the next epoch.
local function begin_lease(id, request, stage, tokens, incarnation, worker_id)
  local record = P .. 'req:' .. id
  dequeue(id, stage, tokens)
  redis.call('SADD', P .. 'held:' .. incarnation, id)
  request.epoch = int(request.epoch + 1)
  redis.call('HSET', record, 'state', 'running', 'owner', incarnation, 'worker', worker_id, 'epoch', request.epoch)
  redis.call('HSETNX', record, 'started_ms', int(now_ms()))
end

-- == Wake-ups ==

-- Adds an entry to a stream of wake-ups. Returns its id.
local function add_wakeup(name, id, ...)
  live(P .. 'wake:' .. name, 3600000)
  return redis.call('XADD', P .. 'wake:' .. name, 'MAXLEN', '~', 64, '*', 'i', id, ...)
end

-- Whether the lease of a worker is valid.
local function is_registered(incarnation)
  local expiry = redis.call('ZSCORE', P .. 'workers', incarnation)
  return expiry and tonumber(expiry) > now_ms()
end

local function worker_of(incarnation)
  return string.match(incarnation, '^(.*):') or incarnation
end

-- Tells a worker, if its lease is valid, that something waits in the queue of a stage; whether it is. `as` is 's' where
-- nobody else is told, 't' where it may steal that.
local function ring(incarnation, as, stage, id)
  if not is_registered(incarnation) then return false end
  add_wakeup('@' .. worker_of(incarnation), id, as, stage)
  return true
end

-- Takes a worker off the ready ones of a stage; false where it was not among them.
local function leave_ready(incarnation, stage)
  redis.call('SREM', P .. 'thieves', incarnation)
  return redis.call('ZREM', P .. 'ready:' .. stage, incarnation) == 1
end

-- The first request of a queue that can be leased without a look at its worker's room: one that is new, short and not
-- background, where nothing in the background waits. Its id, and fields of its record.
local function first_simple(stage)
  local queue = P .. 'q:' .. stage
  local id, last = redis.call('ZRANGE', queue, 0, 0)[1], redis.call('ZRANGE', queue, -1, -1, 'WITHSCORES')
  if not id or tonumber(last[2]) >= BACKGROUND then return nil end
  local request = checked(id, 'body', 'ids')
  local is_new = request.state == 'queued' and request.stage == stage and request.epoch == '0'
  if not is_new or fault(id, request) or not request.body or not request.ids or #request.ids % 4 > 0 then return nil end
  if #request.body + #request.ids > 2048 then return nil end  -- chosen: longer ones gain little, and fill the stream
  if request.deadline_ms and tonumber(request.deadline_ms) <= now_ms() then return nil end
  return id, request
end

-- Leases the first request of a queue to a worker that runs nothing: any request fits that. The wake-up has it all.
-- The worker stays ready where it has room for another. False where it has to look itself.
local function lease_first(stage, incarnation, backlog_ms)
  local eager = redis.call('HGET', P .. 'w:' .. incarnation, 'eager') or ''
  local most, prefill, request_ms, token_ms = string.match(eager, '^(%d+) (%d+) ([%d.]+) ([%d.]+)$')
  if not tonumber(request_ms) or not tonumber(token_ms) then return false end
  if not is_registered(incarnation) or redis.call('EXISTS', P .. 'held:' .. incarnation) == 1 then return false end
  local id, request = first_simple(stage)
  if not id then return false end
  local tokens = tonumber(request.prompt_tokens)
  begin_lease(id, request, stage, tokens, incarnation, worker_of(incarnation))
  local has_room = tonumber(most) > 1 and tonumber(prefill) > tokens
  local entry = add_wakeup('@' .. worker_of(incarnation), id, 's', stage, 'n', incarnation, 'e', request.epoch,
    'y', request.body, 'b', request.ids, 'p', request.prompt_tokens, 'c', request.score, 'm', request.submitted_ms,
    'd', request.deadline_ms or '0', 'r', has_room and '1' or '0')
  redis.call('HSET', P .. 'req:' .. id, 'wakeup', entry)
  if has_room then
    redis.call('ZADD', P .. 'ready:' .. stage, string.format('%.3f', backlog_ms + request_ms + token_ms * tokens),
      incarnation)
  else
    redis.call('SREM', P .. 'thieves', incarnation)
  end
  return true
end

-- Wakes the lightest of a stage's ready workers, one for each of `num` requests; how many there were too few.
-- One that runs nothing gets the first request at once.
local function wake_ready(stage, id, num)
  while num > 0 do
    local lightest, backlog_ms = unpack(redis.call('ZPOPMIN', P .. 'ready:' .. stage))
    if not lightest then break end
    if lease_first(stage, lightest, backlog_ms) then
      num = num - 1
    else
      redis.call('SREM', P .. 'thieves', lightest)
      if ring(lightest, 's', stage, id) then num = num - 1 end
    end
  end
  return num
end

-- Takes a worker off the ready ones because it takes nothing any more. If it was woken already, another one is.
local function stop_waiting(incarnation, stage)
  if leave_ready(incarnation, stage) or redis.call('EXISTS', P .. 'q:' .. stage) == 0 then return end
  wake_ready(stage, '', 1)
end

-- Removes a worker that holds nothing and takes nothing any more.
local function remove_worker(incarnation)
  redis.call('ZREM', P .. 'workers', incarnation)
  local stage = redis.call('HGET', P .. 'w:' .. incarnation, 'ready')
  if stage then stop_waiting(incarnation, stage) end
  redis.call('DEL', P .. 'w:' .. incarnation, P .. 'ctl:' .. incarnation, P .. 'blocks:' .. incarnation,
    P .. 'held:' .. incarnation)
end

-- Wakes one worker for each new request of a queue. Where too few of the stage are ready, two that may steal it
-- are drawn, and all of an earlier release are told.
local function wake(stage, arrival)
  if arrival.is_foreground then redis.call('HSET', P .. 'foreground', stage, int(now_ms())) end
  if string.find(stage, '^%d') then
    if wake_ready(stage, arrival.id, arrival.num) == 0 then return end
    for _, thief in ipairs(redis.call('SRANDMEMBER', P .. 'thieves', 2)) do
      if not ring(thief, 't', stage, arrival.id) then redis.call('SREM', P .. 'thieves', thief) end
    end
  end
  add_wakeup(stage, arrival.id)
end

local function finish()
  if #read > 0 then
    redis.call('XACK', P .. 'in', 'd', unpack(read))
    redis.call('XDEL', P .. 'in', unpack(read))
  end
  for key, sum in pairs(sums) do
    for field, by in pairs(sum) do redis.call('HINCRBY', key, field, int(by)) end
  end
  for stage, arrival in pairs(arrivals) do wake(stage, arrival) end
  for key, for_ms in pairs(lives) do redis.call('PEXPIRE', key, for_ms) end
end

