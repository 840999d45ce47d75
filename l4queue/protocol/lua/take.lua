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
-- Background requests (score from BACKGROUND on) have the place of their score less BACKGROUND. Where they may not
-- be taken they are passed over, and hold up nobody.
-- A request whose deadline has passed ends as expired instead of being computed.
-- Returns {'LOST'} when the incarnation is not registered or its lease has run out (what it takes then would
--         be reaped and blamed at once; a replay is answered all the same), else {'OK', grant...} where a grant is
--         {id, epoch, body, packed ids, offset, prompt_tokens, crashes, score, submitted_ms, deadline_ms, stage, from, kv,
--         '1' for background}
local expiry = redis.call('ZSCORE', KEYS[4], ARGV[1])
if not expiry then return {'LOST'} end
local out = {'OK'}
local FIELDS = {'state', 'owner', 'epoch', 'body', 'ids', 'offset', 'prompt_tokens', 'crashes', 'score',
  'submitted_ms', 'deadline_ms', 'stage', 'from', 'kv'}
local overdue = now_ms() - ARGV[18]
local function is_background(score)
  return tonumber(score) >= BACKGROUND and score - BACKGROUND > overdue
end
local function grant(id, v)
  out[#out + 1] = {id, v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11] or '0', v[12], v[13] or '', v[14] or '',
    is_background(v[9]) and '1' or ''}
end
local w = redis.call('HMGET', KEYS[2], 'nonce', 'grants', 'alone')
if w[1] == ARGV[2] then
  for id, epoch in string.gmatch(w[2] or '', '([^ ,]+),(%d+)') do
    local v = redis.call('HMGET', P .. 'req:' .. id, unpack(FIELDS))
    if is_owner(v, ARGV[1], epoch) then grant(id, v) end
  end
  return out
end
if tonumber(expiry) <= now_ms() then return {'LOST'} end
local solo = ARGV[7] == 'solo'
if w[3] and redis.call('SISMEMBER', KEYS[3], w[3]) == 1 then return out end
if solo and redis.call('SCARD', KEYS[3]) > 0 then return out end
redis.call('HDEL', KEYS[2], 'alone')
local room, prefill, now, list = tonumber(ARGV[4]), tonumber(ARGV[8]), now_ms(), {}
local longest = tonumber(ARGV[14])
local personal = string.sub(ARGV[7], 1, 1) == '@'
local stolen = not solo and not personal and ARGV[11] ~= ARGV[7]
local most = solo and math.min(1, ARGV[3]) or tonumber(ARGV[3])
local background, longest_background = most, longest
if now - (whole(redis.call('HGET', P .. 'foreground', ARGV[11])) or 0) < tonumber(ARGV[15]) then
  background, longest_background = tonumber(ARGV[16]), tonumber(ARGV[17])
end
local shares, sharers = {most, most}, tonumber(ARGV[10])
if sharers > 1 then
  local num = redis.call('ZCOUNT', KEYS[1], int(BACKGROUND), '+inf')
  local other = redis.call('ZCARD', KEYS[1]) - num
  shares = {math.min(most, math.ceil(other / (2 * sharers))), math.min(most, math.ceil(num / (2 * sharers)))}
end
-- The next `n` that may be taken, in order: {id, class (1 others, 2 background)}.
local function next_in_order(n)
  local upto = background > 0 and '+inf' or int(BACKGROUND + overdue)
  local a = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '(' .. int(BACKGROUND), 'WITHSCORES',
    'LIMIT', 0, math.min(n, shares[1]))
  local b = redis.call('ZRANGEBYSCORE', KEYS[1], int(BACKGROUND), upto, 'WITHSCORES',
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
local function lease(id, v, tokens)
  local rk = P .. 'req:' .. id
  dequeue(id, ARGV[7], tokens)
  redis.call('SADD', KEYS[3], id)
  v[3] = int(v[3] + 1)
  redis.call('HSET', rk, 'state', 'running', 'owner', ARGV[1], 'worker', ARGV[6], 'epoch', v[3])
  redis.call('HSETNX', rk, 'started_ms', int(now))
  if personal then
    redis.call('HSET', rk, 'stage', ARGV[11])
    v[12] = ARGV[11]
  end
  if stolen then
    redis.call('HINCRBY', P .. 'counts', 'steals_waiting', 1)
    note(rk, {what = 'stolen', worker = ARGV[6], from = ARGV[7], to = ARGV[11], benefit_ms = tonumber(ARGV[12]),
      cost_ms = tonumber(ARGV[13])})
  elseif v[3] ~= '1' then
    note(rk, {what = 'taken', worker = ARGV[6], from = ARGV[7]})
  end
  if solo then redis.call('HSET', KEYS[2], 'alone', id) end
  list[#list + 1] = id .. ',' .. v[3]
  grant(id, v)
end
local passes, is_full = 0, false
repeat  -- again for those that were only dropped; bounded, as nobody else is served meanwhile
  local gone, left = 0, most - #list
  for _, entry in ipairs(next_in_order(left)) do
    local id, class, is_back = unpack(entry)
    if left <= 0 then break end
    if not is_back or background > 0 then
      local v = redis.call('HMGET', P .. 'req:' .. id, unpack(FIELDS))
      local tokens = (tonumber(v[7]) or 0) + (tonumber(v[6]) or 0)
      local first = #list == 0 and ARGV[9] == '1'
      local full = #list > 0 and prefill <= 0 or not first and (room < tokens + ARGV[5] or tokens > longest)
      if v[1] ~= 'queued' or v[12] ~= ARGV[7] then
        dequeue(id, ARGV[7], 0)
        gone, left = gone + 1, left - 1
      elseif fault(id) or not v[4] or not v[5] or #v[5] % 4 > 0 then
        condemn(id, fault(id) or 'ids')
        gone, left = gone + 1, left - 1
      elseif v[11] and tonumber(v[11]) <= now then
        settle(id, 'expired', '', {'error', 'its deadline passed while it was queued'})
        gone, left = gone + 1, left - 1
      elseif is_back and (full or not first and tokens > longest_background) then
        background = 0
      elseif full then
        is_full = true
        break
      else
        room, prefill = room - tokens - ARGV[5], prefill - tokens
        lease(id, v, tokens)
        left, shares[class] = left - 1, shares[class] - 1
        if is_back then background = background - 1 end
      end
    end
  end
  passes = passes + 1
until gone == 0 or is_full or #list >= most or passes == 16
redis.call('HSET', KEYS[2], 'nonce', ARGV[2], 'grants', table.concat(list, ' '))
return out
