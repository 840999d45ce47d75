-- Appends generated tokens to the output stream of a running request, and tells its followers. The entry id is the
-- token offset.
-- KEYS  1 req:<id>  2 out:<id> (stream)
-- ARGV  1 incarnation  2 epoch  3 offset before  4 number of tokens  5 packed ids  6 text
--       7 cached prompt tokens: '<found>' or '<found> <made>', with the first tokens, '' = not told
--       8 packed logprobs (only when asked for)
-- Returns 'OK' | 'DUP' | 'HAVE:<offset>' (partly there) | 'GAP:<offset>' (earlier ones are missing) | 'FENCED'
local record, out = unpack(KEYS)
local incarnation, epoch, ids, text, cached, logprobs = ARGV[1], ARGV[2], ARGV[5], ARGV[6], ARGV[7], ARGV[8]
local from, num = tonumber(ARGV[3]), tonumber(ARGV[4])
local id, upto = string.sub(record, #P + 5), from + num

-- Charged at the end of each 256 tokens but the first, as many as there is room for from the beginning.
local function steps(tokens)
  return math.max(1, math.floor(tokens / 256))
end

local request = fields(record, {'state', 'owner', 'epoch', 'offset', 'first_token_ms', 'moved_ms', 'followers'})
if not is_owner(request, incarnation, epoch) then return 'FENCED' end
local have = whole(request.offset)
if not have then
  condemn(id, 'offset')
  return 'FENCED'
end
if upto <= have then return 'DUP' end
if from < have then return 'HAVE:' .. request.offset end
if from > have then return 'GAP:' .. request.offset end
redis.call('HDEL', record, '-')  -- needs no memory: a full server refuses a script whose first write does
resumed(record, request.moved_ms)
if not append(out, upto, ids, text, cached, logprobs, request.followers) then
  condemn(id, 'output')
  return 'FENCED'
end
local grown = (steps(upto) - steps(have)) * 256 / num * (#ids + #text + #(logprobs or '') + 15)
if request.first_token_ms then
  redis.call('HSET', record, 'offset', int(upto))
else
  redis.call('HSET', record, 'offset', int(upto), 'first_token_ms', int(now_ms()), cached_fact(cached))
  grown = grown + OUTPUT_BYTES
end
if grown > 0 then charge(record, grown) end
return 'OK'
