-- Puts a counted request into its stage queue and takes it off the inbox. submitted -> queued
-- Safe to repeat and safe for two dispatchers: the second one only clears the inbox entry.
-- KEYS  1 in (stream)  2 req:<id>  3 hist
-- ARGV  1 id  2 inbox entry id  3 stage  4 score (lower is served first)  5 prompt_tokens  6 max_tokens
--       7 packed token ids ('' = the prompt is those, and stays)  8 plan version  9 length bucket  10 why this stage (JSON, '' = nothing to say)
--       11 charge_tokens ('' = prompt and max_tokens)  12 body (JSON, '' = as submitted)
--       13 keys of the prompt's blocks, packed ('' = not told)  14 bytes of a key  15 tokens of a block
--       16 version of the plan that its caller has seen ('' = any): where another is in force, nothing is done
-- Notes when a request that is not background last came to the stage: workers then hold back the others.
-- Returns 'OK' | 'DUP' | 'STALE:<version>' (of the plan in force: decide anew)
local record, hist = unpack(KEYS, 2, 3)
local id, entry, stage, score = unpack(ARGV, 1, 4)
local prompt_tokens, max_tokens, charge_tokens = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[11])
local ids, plan, bucket, why, body = ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[12]

-- How much of the prompt the workers hold that hold most of it: {worker: tokens} (JSON); '' where none holds any.
-- A worker that has a block has those before it.
local function holders(keys, size, block_tokens)
  local function has(blocks, n) return redis.call('SISMEMBER', blocks, string.sub(keys, (n - 1) * size + 1, n * size)) == 1 end
  local found = {}
  for _, incarnation in ipairs(redis.call('ZRANGEBYSCORE', P .. 'workers', int(now_ms()), '+inf')) do
    local blocks, low, high = P .. 'blocks:' .. incarnation, 0, #keys / size
    if not has(blocks, 1) then high = 0 end
    while low < high do
      local middle = math.ceil((low + high) / 2)
      if has(blocks, middle) then low = middle else high = middle - 1 end
    end
    if low > 0 then found[#found + 1] = {string.match(incarnation, '^(.*):') or incarnation, low * block_tokens} end
  end
  table.sort(found, function(a, b) return a[2] > b[2] end)
  local told = {}
  for i = 1, math.min(#found, 16) do told[found[i][1]] = found[i][2] end
  return #found > 0 and cjson.encode(told) or ''
end

local request = checked(id)
if request.state == 'submitted' and ARGV[16] ~= '' and plan_in_force() ~= ARGV[16] then
  return 'STALE:' .. plan_in_force()
end
read[#read + 1] = entry
if request.state ~= 'submitted' then return 'DUP' end
local what = fault(id, request)
if what then
  condemn(id, what)
  return 'DUP'
end
if ids == '' then
  ids = redis.call('HGET', record, 'prompt') or ''
  if #ids ~= 4 * prompt_tokens then
    condemn(id, 'prompt')
    return 'DUP'
  end
end
local tokens = charge_tokens or prompt_tokens + max_tokens
redis.call('HDEL', record, 'prompt', 'entry')
redis.call('HSET', record, 'state', 'queued', 'stage', stage, 'score', score, 'prompt_tokens', prompt_tokens,
  'max_tokens', max_tokens, 'ids', ids, 'plan', plan, 'charge_tokens', int(tokens), 'queued_ms', int(now_ms()))
count('live_tokens', tokens - request.charge_tokens)
count('prompt_tokens', prompt_tokens)
add(hist, 'a:' .. bucket, 1)
add(hist, 'p:' .. bucket, prompt_tokens)
if why ~= '' then redis.call('HSET', record, 'why', why) end
if body ~= '' then redis.call('HSET', record, 'body', body) end
if ARGV[13] ~= '' then
  redis.call('HSET', record, 'blocks', ARGV[13])
  local held = holders(ARGV[13], tonumber(ARGV[14]), tonumber(ARGV[15]))
  if held ~= '' then redis.call('HSET', record, 'held', held) end
end
charge(record, footprint(record) - (request.charge_bytes or 0))
enqueue(id, stage, score, prompt_tokens)
if tonumber(score) < BACKGROUND and string.sub(stage, 1, 1) ~= '@' then arrivals[stage].is_foreground = true end
return 'OK'
