-- Counts what a caller's requests have used in place of what they might have, and forgets them.
-- KEYS  1 limit:<caller>  2 charged:<caller>, as of charge
-- ARGV  1 tokens a minute, 0: no limit  2.. pairs of id and tokens used
-- Returns the difference in tokens; one that is forgotten already makes none
local limit, charged, per_minute = KEYS[1], KEYS[2], tonumber(ARGV[1])
local ids, found, reserved, more = {}, {}, 0, 0
for i = 2, #ARGV, 2 do ids[#ids + 1] = ARGV[i] end
for i, kept in ipairs(redis.call('HMGET', charged, unpack(ids))) do
  if kept then
    local tokens = whole(string.match(kept, '^%d+')) or 0
    found[#found + 1] = ids[i]
    reserved, more = reserved + tokens, more + tonumber(ARGV[2 * i + 1]) - tokens
  end
end
if #found > 0 then
  redis.call('HDEL', charged, unpack(found))
  redis.call('HINCRBY', charged, '*', int(-reserved))
end
local kept = fields(limit, {'tokens', 'at'})
if more ~= 0 and per_minute > 0 and whole(kept.at) then  -- the time stays: it is that of the other bucket, too
  local leak = math.max(0, now_ms() - whole(kept.at)) * per_minute / 60000
  local level = math.max(0, math.max(0, (tonumber(kept.tokens or 0) or 0) - leak) + more)
  redis.call('HSET', limit, 'tokens', string.format('%.3f', level + leak))
end
return int(more)
