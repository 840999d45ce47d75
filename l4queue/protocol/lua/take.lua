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
-- A request whose deadline has passed ends as expired instead of being computed.
-- Returns {'LOST'} when the incarnation is not registered or its lease has run out (what it takes then would
--         be reaped and blamed at once; a replay is answered all the same), else {'OK', grant...} where a grant is
--         {id, epoch, body, packed ids, offset, prompt_tokens, crashes, score, submitted_ms, deadline_ms, stage, from, kv}
local expiry = redis.call('ZSCORE', KEYS[4], ARGV[1])
if not expiry then return {'LOST'} end
local out = {'OK'}
local FIELDS = {'state', 'owner', 'epoch', 'body', 'ids', 'offset', 'prompt_tokens', 'crashes', 'score',
  'submitted_ms', 'deadline_ms', 'stage', 'from', 'kv'}
local function grant(id, v)
  out[#out + 1] = {id, v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11] or '0', v[12], v[13] or '', v[14] or ''}
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
local most = solo and math.min(1, ARGV[3]) or ARGV[3]
local sharers = tonumber(ARGV[10])
if sharers > 1 then most = math.min(most, math.ceil(redis.call('ZCARD', KEYS[1]) / (2 * sharers))) end
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
  local gone = 0
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', '+inf', 'LIMIT', 0, most - #list)) do
    local v = redis.call('HMGET', P .. 'req:' .. id, unpack(FIELDS))
    if v[1] ~= 'queued' or v[12] ~= ARGV[7] then
      dequeue(id, ARGV[7], 0)
      gone = gone + 1
    elseif v[11] and tonumber(v[11]) <= now then
      settle(id, 'expired', '', {'error', 'its deadline passed while it was queued'})
      gone = gone + 1
    else
      local tokens = tonumber(v[7]) + tonumber(v[6])
      room = room - tokens - ARGV[5]
      local first = #list == 0 and ARGV[9] == '1'
      is_full = #list > 0 and prefill <= 0 or not first and (room < 0 or tokens > longest)
      if is_full then break end
      prefill = prefill - tokens
      lease(id, v, tokens)
    end
  end
  passes = passes + 1
until gone == 0 or is_full or #list >= tonumber(most) or passes == 16
redis.call('HSET', KEYS[2], 'nonce', ARGV[2], 'grants', table.concat(list, ' '))
return out
