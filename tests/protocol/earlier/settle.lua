-- Writes the one outcome of a running request, with its last tokens. running -> done | failed
-- KEYS  1 req:<id>  2 out:<id> (stream)
-- ARGV  1 id  2 incarnation  3 epoch  4 offset before  5 number of last tokens  6 packed ids  7 text of these tokens
--       8 text held back until now  9 state (done | failed)  10 finish reason  11 error ('' = none)  12 field ('' = none)
--       13 packed logprobs of the last tokens (only when asked for)
-- Returns 'OK' | 'DUP' | 'GAP:<offset>' | 'FENCED'
local v = redis.call('HMGET', KEYS[1], 'state', 'owner', 'epoch', 'offset', 'first_token_ms', 'settled_epoch',
  'moved_ms')
if v[1] == ARGV[9] and v[6] == ARGV[3] then return 'DUP' end
if not is_owner(v, ARGV[2], ARGV[3]) then return 'FENCED' end
local have, upto = tonumber(v[4]), ARGV[4] + ARGV[5]
if upto ~= have then
  if tonumber(ARGV[4]) ~= have then return 'GAP:' .. v[4] end
  redis.call('SREM', P .. 'held:' .. ARGV[2], ARGV[1])
  append(KEYS[2], upto, ARGV[6], ARGV[7], ARGV[13])
  redis.call('HSET', KEYS[1], 'offset', int(upto))
  resumed(KEYS[1], v[7])
  if not v[5] then redis.call('HSET', KEYS[1], 'first_token_ms', int(now_ms())) end
end
settle(ARGV[1], ARGV[9], ARGV[8],
  {'finish_reason', ARGV[10], 'error', ARGV[11], 'field', ARGV[12], 'settled_epoch', ARGV[3]})
return 'OK'
