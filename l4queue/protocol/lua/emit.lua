-- Appends generated tokens to the output stream of a running request, and tells its followers. The entry id is the
-- token offset.
-- KEYS  1 req:<id>  2 out:<id> (stream)
-- ARGV  1 incarnation  2 epoch  3 offset before  4 number of tokens  5 packed ids  6 text
--       7 packed logprobs (only when asked for)
-- Returns 'OK' | 'DUP' | 'HAVE:<offset>' (partly there) | 'GAP:<offset>' (earlier ones are missing) | 'FENCED'
-- Charged at the end of each 256 tokens but the first, as many as there is room for from the beginning.
local function steps(tokens)
  return math.max(1, math.floor(tokens / 256))
end
local v = redis.call('HMGET', KEYS[1], 'state', 'owner', 'epoch', 'offset', 'first_token_ms', 'moved_ms',
  'followers')
if not is_owner(v, ARGV[1], ARGV[2]) then return 'FENCED' end
local id, have, from, upto = string.sub(KEYS[1], #P + 5), whole(v[4]), tonumber(ARGV[3]), ARGV[3] + ARGV[4]
if not have then
  condemn(id, 'offset')
  return 'FENCED'
end
if upto <= have then return 'DUP' end
if from < have then return 'HAVE:' .. v[4] end
if from > have then return 'GAP:' .. v[4] end
redis.call('HDEL', KEYS[1], '-')
resumed(KEYS[1], v[6])
if not append(KEYS[2], upto, ARGV[5], ARGV[6], ARGV[7], v[7]) then
  condemn(id, 'output')
  return 'FENCED'
end
local grown = (steps(upto) - steps(have)) * 256 / ARGV[4] * (#ARGV[5] + #ARGV[6] + #(ARGV[7] or '') + 15)
if v[5] then
  redis.call('HSET', KEYS[1], 'offset', int(upto))
else
  redis.call('HSET', KEYS[1], 'offset', int(upto), 'first_token_ms', int(now_ms()))
  grown = grown + OUTPUT_BYTES
end
if grown > 0 then charge(KEYS[1], grown) end
return 'OK'
