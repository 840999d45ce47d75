-- Counts what a caller's requests have used in place of what they might have, and forgets them.
-- KEYS  1 limit:<caller>  2 charged:<caller>, as of charge
-- ARGV  1 tokens a minute, 0: no limit  2 tokens used by all  3.. ids
-- Returns the difference in tokens; 0 where they are forgotten already
local limit, charged, per_minute, reserved, has_any = KEYS[1], KEYS[2], tonumber(ARGV[1]), 0, false
for i = 3, #ARGV do
  local kept = redis.call('HGET', charged, ARGV[i])
  if kept then
    has_any = true
    redis.call('HDEL', charged, ARGV[i])
    reserved = reserved + (whole(string.match(kept, '^%d+')) or 0)
  end
end
if not has_any then return 0 end
local more = tonumber(ARGV[2]) - reserved
redis.call('HINCRBY', charged, '*', int(-reserved))
local kept = fields(limit, {'tokens', 'at'})
if per_minute > 0 and whole(kept.at) then  -- the time stays: it is that of the other bucket, too
  local leak = math.max(0, now_ms() - whole(kept.at)) * per_minute / 60000
  local level = math.max(0, math.max(0, (tonumber(kept.tokens or 0) or 0) - leak) + more)
  redis.call('HSET', limit, 'tokens', string.format('%.3f', level + leak))
end
return int(more)
