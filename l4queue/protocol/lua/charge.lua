-- Counts requests against the limits of their caller, before they are enqueued; none of them where one is full.
-- KEYS  1 limit:<caller> (hash: requests, tokens: levels of the buckets; at: ms)  2 charged:<caller> (hash: id ->
--       "<tokens> <ms>"; '*': sum of tokens)
-- ARGV  1 requests a minute  2 tokens a minute  3 tokens in the backlog, 0: no limit  4 requests to count
--       5 tokens of each id  6.. ids
-- Returns { the limit that is full or '', ms until there may be room, requests left, ms until their bucket is empty,
--           the same of tokens }
local limit, charged, now = KEYS[1], KEYS[2], now_ms()
local most = {requests = tonumber(ARGV[1]), tokens = tonumber(ARGV[2])}
local backlog, each, num_ids = tonumber(ARGV[3]), tonumber(ARGV[5]), #ARGV - 5
local asked = {requests = tonumber(ARGV[4]), tokens = each * num_ids}
local is_known = redis.call('HEXISTS', charged, ARGV[6]) == 1  -- the call is repeated
local kept = fields(limit, {'requests', 'tokens', 'at'})
local passed_ms = math.max(0, now - (whole(kept.at) or now))
local levels, full, retry_ms = {}, '', 0
for name, per_minute in pairs(most) do
  levels[name] = math.max(0, (tonumber(kept[name] or 0) or 0) - passed_ms * per_minute / 60000)
end

-- Tokens of the caller's requests that have not ended; what has is forgotten. One may be on its way for a minute.
local function live_tokens()
  local found, sum = redis.call('HGETALL', charged), 0
  for i = 1, #found, 2 do
    local id = found[i]
    if id ~= '*' then
      local tokens, since = string.match(found[i + 1], '^(%d+) (%d+)$')
      local state = redis.call('HGET', P .. 'req:' .. id, 'state')
      if whole(tokens) and (is_live(state) or not state and now - (whole(since) or 0) < 60000) then
        sum = sum + whole(tokens)
      else
        redis.call('HDEL', charged, id)
      end
    end
  end
  redis.call('HSET', charged, '*', int(sum))
  return sum
end

if not is_known then
  for _, name in ipairs({'requests', 'tokens'}) do
    local wanted, per_minute = math.min(asked[name], most[name]), most[name]
    local excess = levels[name] + wanted - per_minute
    if full == '' and wanted > 0 and excess > 0.001 then
      full, retry_ms = name, math.ceil(excess * 60000 / per_minute)
    end
  end
  if full == '' and backlog > 0 then
    local sum = whole(redis.call('HGET', charged, '*')) or 0
    if sum + asked.tokens > backlog then sum = live_tokens() end
    if sum > 0 and sum + asked.tokens > backlog then full, retry_ms = 'backlog', 1000 end
  end
end
if full == '' and not is_known then
  for name, level in pairs(levels) do
    if most[name] > 0 then levels[name] = level + asked[name] end
  end
  redis.call('HSET', limit, 'requests', string.format('%.3f', levels.requests), 'tokens',
    string.format('%.3f', levels.tokens), 'at', int(now))
  for i = 6, #ARGV do redis.call('HSET', charged, ARGV[i], int(each) .. ' ' .. int(now)) end
  redis.call('HINCRBY', charged, '*', int(asked.tokens))
  redis.call('PEXPIRE', limit, 86400000)
  redis.call('PEXPIRE', charged, 86400000)
end
local told = {full, int(retry_ms)}
for _, name in ipairs({'requests', 'tokens'}) do
  local per_minute, level = most[name], levels[name]
  told[#told + 1] = int(math.max(0, math.floor(per_minute - level + 0.001)))
  told[#told + 1] = per_minute > 0 and int(math.ceil(level * 60000 / per_minute)) or '0'
end
return told
