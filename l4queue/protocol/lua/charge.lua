-- Counts requests against the limits of their caller before they are enqueued: in order, until one finds no room.
-- KEYS  1 limit:<caller> (hash: requests, tokens: levels of the buckets; at: ms; refused: "<limit> <from ms> <to ms>",
--       when batches stand back; looked: ms)  2 charged:<caller> (hash: id -> "<tokens> <ms>"; '*': sum of tokens)
-- ARGV  1 requests a minute  2 tokens a minute  3 tokens in the backlog, 0: no limit
--       4 share of each limit that may be filled
--       5 requests that all ids are together: all or none is counted; '': lines of a batch, each of them a request
--       6.. pairs of id and tokens; without tokens it is not kept, and its repeat counts again
-- Returns { ids that are counted, from the first on, the limit that is full or '', ms until there may be room,
--           requests left, ms until their bucket is empty, the same of tokens }
local STAND_BACK_MS = 5000  -- beyond the time at which a refused request may come again. Chosen: clients round it up
local LOOK_EVERY_MS = 5000  -- for lines that ended unsettled: their gateways settle them, but for those that die
local limit, charged, now = KEYS[1], KEYS[2], now_ms()
local most = {requests = tonumber(ARGV[1]), tokens = tonumber(ARGV[2]), backlog = tonumber(ARGV[3])}
local share, is_lines, num_requests = tonumber(ARGV[4]), ARGV[5] == '', tonumber(ARGV[5]) or 1
local kept = fields(limit, {'requests', 'tokens', 'at', 'refused', 'looked'})
local passed_ms = math.max(0, now - (whole(kept.at) or now))
local backlog = most.backlog > 0 and whole(redis.call('HGET', charged, '*')) or 0
local levels, new, num_tokens, num_counted, has_changed = {}, {}, 0, 0, false
for _, name in ipairs({'requests', 'tokens'}) do
  levels[name] = math.max(0, (tonumber(kept[name] or 0) or 0) - passed_ms * most[name] / 60000)
end

-- State, prompt tokens and output tokens of a request by the id that was made of its key.
local function facts_of(id)
  local found = fields(P .. 'req:' .. id, {'state', 'prompt_tokens', 'offset'})
  if found.state then return found end
  local later = redis.call('GET', P .. 'key:' .. id)
  return later and fields(P .. 'req:' .. later, {'state', 'prompt_tokens', 'offset'}) or found
end

-- Ids that were counted before: the call is repeated, or another gateway goes on with a batch. The record of a line
-- stays until its answer is durable, also where it is settled already. New lines, which most are, cost two commands.
local function known_ids()
  local ids, known, names = {}, {}, {}
  for i = 6, #ARGV, 2 do ids[#ids + 1] = ARGV[i] end
  for i, value in ipairs(redis.call('HMGET', charged, unpack(ids))) do
    local id = ids[i]
    known[id] = value and true
    if not value then names[#names + 1], names[#names + 2] = P .. 'req:' .. id, P .. 'key:' .. id end
  end
  if not is_lines or #names == 0 or redis.call('EXISTS', unpack(names)) == 0 then return known end
  for _, id in ipairs(ids) do known[id] = known[id] or facts_of(id).state end
  return known
end

-- Counts anew the tokens of the caller's requests that have not ended, and settles what has. One may be on its way
-- for a minute.
local function look()
  local found, more = redis.call('HGETALL', charged), 0
  backlog, has_changed = 0, true
  for i = 1, #found, 2 do
    local id = found[i]
    if id ~= '*' then
      local tokens, since = string.match(found[i + 1], '^(%d+) (%d+)$')
      local facts = facts_of(id)
      if whole(tokens) and (is_live(facts.state) or not facts.state and now - (whole(since) or 0) < 60000) then
        backlog = backlog + whole(tokens)
      else
        redis.call('HDEL', charged, id)
        more = more + (whole(facts.prompt_tokens) or 0) + (whole(facts.offset) or 0) - (whole(tokens) or 0)
      end
    end
  end
  redis.call('HSET', charged, '*', int(backlog))
  redis.call('HSET', limit, 'looked', int(now))
  backlog = backlog + num_tokens  -- those of this call are added at its end
  if most.tokens > 0 then levels.tokens = math.max(0, levels.tokens + more) end
end

-- The limit that has no room for this much, and ms until there may be some; '' where all have.
local function obstacle(requests, tokens)
  local name, from, to = string.match(is_lines and kept.refused or '', '^(%l+) (%d+) (%d+)$')
  if name and now >= tonumber(from) and now < tonumber(to) then return name, tonumber(to) - now end
  local asked = {requests = requests, tokens = tokens}
  for _, name in ipairs({'requests', 'tokens'}) do
    local ceiling = most[name] * share
    local excess = levels[name] + math.min(asked[name], ceiling) - ceiling
    if asked[name] > 0 and ceiling > 0 and excess > 0.001 then
      return name, math.ceil(excess * 60000 / most[name])
    end
  end
  local ceiling = most.backlog * share
  if ceiling > 0 and tokens > 0 and backlog + tokens > ceiling then
    if not is_lines or now - (whole(kept.looked) or 0) >= LOOK_EVERY_MS then look() end
    if backlog > 0 and backlog + tokens > ceiling then return 'backlog', 1000 end
  end
  return '', 0
end

local known, full, retry_ms = known_ids(), '', 0
local size = is_lines and 2 or #ARGV - 5  -- arguments that count together
for first = 6, #ARGV, size do
  if not known[ARGV[first]] then
    local tokens = 0
    for i = first, first + size - 1, 2 do tokens = tokens + tonumber(ARGV[i + 1]) end
    full, retry_ms = obstacle(num_requests, tokens)
    if full ~= '' then break end
    if most.requests > 0 then levels.requests = levels.requests + num_requests end
    if most.tokens > 0 then levels.tokens = levels.tokens + tokens end
    backlog, num_tokens, has_changed = backlog + tokens, num_tokens + tokens, true
    for i = first, first + size - 1, 2 do
      if tonumber(ARGV[i + 1]) > 0 then
        new[#new + 1], new[#new + 2] = ARGV[i], ARGV[i + 1] .. ' ' .. int(now)
      end
    end
  end
  num_counted = num_counted + size / 2
end
if has_changed then
  redis.call('HSET', limit, 'requests', string.format('%.3f', levels.requests), 'tokens',
    string.format('%.3f', levels.tokens), 'at', int(now))
end
if #new > 0 then
  redis.call('HSET', charged, unpack(new))
  redis.call('HINCRBY', charged, '*', int(num_tokens))
end
if full ~= '' and not is_lines then
  redis.call('HSET', limit, 'refused', full .. ' ' .. int(now) .. ' ' .. int(now + retry_ms + STAND_BACK_MS))
end
if has_changed or full ~= '' then
  redis.call('PEXPIRE', limit, 86400000)
  redis.call('PEXPIRE', charged, 86400000)
end
local told = {int(num_counted), full, int(retry_ms)}
for _, name in ipairs({'requests', 'tokens'}) do
  local per_minute, level = most[name], levels[name]
  told[#told + 1] = int(math.max(0, math.floor(per_minute - level + 0.001)))
  told[#told + 1] = per_minute > 0 and int(math.ceil(level * 60000 / per_minute)) or '0'
end
return told
