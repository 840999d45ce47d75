-- Surveys what every worker looks at: the other workers, the queues, the plan's version, the latest outputs.
-- It is kept for a moment, so that most looks of a large fleet read what another worker had surveyed.
-- KEYS  1 workers (zset)  2 survey (string)
-- ARGV  1 greatest age of one that will do (ms, 0 = none does)  2 for how long others may read this one (ms)
--       3 most workers: that number is drawn from more  4 most outputs
-- Returns its moment (ms), a space and JSON: num_workers, workers (incarnation, brief or load, ...), plan, inbox,
-- queues (stage, waiting tokens, requests, of these not background, when one of these came (ms), id of the first, ...),
-- outputs (id of the ending, tokens, ...); lists, since Lua has one kind of table
local workers, kept = unpack(KEYS)
local max_age_ms, keep_ms, most, num_outputs = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), ARGV[4]
local now = now_ms()
local last = redis.call('GET', kept)
local at = whole(string.match(last or '', '^(%d+) {'))
if at and max_age_ms > 0 and now - at >= 0 and now - at <= max_age_ms then return last end
local found = {workers = {}, queues = {}, outputs = {}, inbox = redis.call('XLEN', P .. 'in'),
  plan = redis.call('HGET', P .. 'plan', 'version') or '0', num_workers = redis.call('ZCOUNT', workers, '(' .. int(now), '+inf')}

local function add_to(list, ...)
  for _, value in ipairs({...}) do list[#list + 1] = value end
end

local drawn = redis.call('ZRANDMEMBER', workers, most, 'WITHSCORES')
for i = 1, #drawn, 2 do
  if tonumber(drawn[i + 1]) > now then
    local told = redis.call('HMGET', P .. 'w:' .. drawn[i], 'brief', 'load')
    add_to(found.workers, drawn[i], string.sub(told[1] and told[1] ~= '' and told[1] or told[2] or '', 1, 8192))
  end
end
local backlog, came = redis.call('HGETALL', P .. 'backlog'), redis.call('HGETALL', P .. 'foreground')
local came_ms = {}
for i = 1, #came, 2 do came_ms[came[i]] = came[i + 1] end
for i = 1, #backlog, 2 do
  local stage = backlog[i]
  local queue = P .. 'q:' .. stage
  add_to(found.queues, stage, backlog[i + 1], redis.call('ZCARD', queue),
    redis.call('ZCOUNT', queue, '-inf', '(' .. int(BACKGROUND)), came_ms[stage] or '',
    redis.call('ZRANGE', queue, 0, 0)[1] or '')
end
for _, entry in ipairs(redis.call('XREVRANGE', P .. 'finished', '+', '-', 'COUNT', num_outputs)) do
  local facts = {}
  for i = 1, #entry[2], 2 do facts[entry[2][i]] = entry[2][i + 1] end
  if facts.s == 'done' and whole(facts.o) then add_to(found.outputs, entry[1], facts.o) end
end
local told = int(now) .. ' ' .. cjson.encode(found)
redis.call('SET', kept, told, 'PX', keep_ms)
return told
