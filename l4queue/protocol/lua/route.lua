-- Puts a counted request into its stage queue and takes it off the inbox. submitted -> queued
-- Safe to repeat and safe for two dispatchers: the second one only clears the inbox entry.
-- KEYS  1 in (stream)  2 req:<id>  3 hist
-- ARGV  1 id  2 inbox entry id  3 stage  4 score (lower is served first)  5 prompt_tokens  6 max_tokens
--       7 packed token ids  8 plan version  9 length bucket  10 why this stage (JSON, '' = nothing to say)
--       11 charge_tokens ('' = prompt and max_tokens)  12 body (JSON, '' = as submitted)
-- Notes when a request that is not background last came to the stage: workers then hold back the others.
-- Returns 'OK' | 'DUP'
local inbox, record, hist = unpack(KEYS)
local id, entry, stage, score = unpack(ARGV, 1, 4)
local prompt_tokens, max_tokens, charge_tokens = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[11])
local ids, plan, bucket, why, body = ARGV[7], ARGV[8], ARGV[9], ARGV[10], ARGV[12]
redis.call('XACK', inbox, 'd', entry)
redis.call('XDEL', inbox, entry)
local request = fields(record, {'state', 'charge_tokens', 'charge_bytes'})
if request.state ~= 'submitted' then return 'DUP' end
local what = fault(id)
if what then
  condemn(id, what)
  return 'DUP'
end
local tokens = charge_tokens or prompt_tokens + max_tokens
redis.call('HDEL', record, 'prompt', 'entry')
redis.call('HSET', record, 'state', 'queued', 'stage', stage, 'score', score, 'prompt_tokens', prompt_tokens,
  'max_tokens', max_tokens, 'ids', ids, 'plan', plan, 'charge_tokens', int(tokens), 'queued_ms', int(now_ms()))
count('live_tokens', tokens - request.charge_tokens)
count('prompt_tokens', prompt_tokens)
add(hist, 'a:' .. bucket, 1)
add(hist, 'p:' .. bucket, prompt_tokens)
if tonumber(score) < BACKGROUND and string.sub(stage, 1, 1) ~= '@' then
  redis.call('HSET', P .. 'foreground', stage, int(now_ms()))
end
if why ~= '' then redis.call('HSET', record, 'why', why) end
if body ~= '' then redis.call('HSET', record, 'body', body) end
charge(record, footprint(record) - (request.charge_bytes or 0))
enqueue(id, stage, score, prompt_tokens)
return 'OK'
