-- Writes the one outcome of a running request, with its last tokens. running -> done | failed
-- KEYS  1 req:<id>  2 out:<id> (stream)
-- ARGV  1 id  2 incarnation  3 epoch  4 offset before  5 number of last tokens  6 packed ids  7 text of these tokens
--       8 text held back until now  9 state (done | failed)  10 finish reason  11 error ('' = none)  12 field ('' = none)
--       13 cached prompt tokens: '<found>' or '<found> <made>', '' = told before, or not known
--       14 keys of the prompt's blocks, packed ('' = not told)
--       15 packed logprobs of the last tokens (only when asked for)
-- Returns 'OK' | 'DUP' | 'GAP:<offset>' | 'FENCED'
local record, out = unpack(KEYS)
local id, incarnation, epoch, ids, text, held_text = ARGV[1], ARGV[2], ARGV[3], ARGV[6], ARGV[7], ARGV[8]
local state, reason, why, field, cached, blocks, logprobs = unpack(ARGV, 9, 15)
local from, num = tonumber(ARGV[4]), tonumber(ARGV[5])
local request = fields(record, {'state', 'owner', 'epoch', 'offset', 'first_token_ms', 'settled_epoch', 'moved_ms',
  'followers'})
if request.state == state and request.settled_epoch == epoch then return 'DUP' end
if not is_owner(request, incarnation, epoch) then return 'FENCED' end
local have, upto = whole(request.offset), from + num
if not have then
  condemn(id, 'offset')
  return 'FENCED'
end
if upto ~= have and from ~= have then return 'GAP:' .. request.offset end
-- needs no memory: a full server refuses a script whose first write does
redis.call('SREM', P .. 'held:' .. incarnation, id)
if upto ~= have then
  if not append(out, upto, ids, text, from == 0 and cached or '', logprobs, request.followers) then
    condemn(id, 'output')
    return 'FENCED'
  end
  local made = {'offset', int(upto), cached_fact(cached)}
  if not request.first_token_ms then made[#made + 1], made[#made + 2] = 'first_token_ms', int(now_ms()) end
  redis.call('HSET', record, unpack(made))
  resumed(record, request.moved_ms)
elseif cached ~= '' then
  redis.call('HSET', record, cached_fact(cached))
end
settle(id, state, held_text, {'finish_reason', reason, 'error', why, 'field', field, 'settled_epoch', epoch}, true,
  blocks ~= '' and blocks or nil)
return 'OK'
