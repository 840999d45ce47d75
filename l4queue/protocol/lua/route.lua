-- Puts a counted request into its stage queue and takes it off the inbox. submitted -> queued
-- Safe to repeat and safe for two dispatchers: whoever comes second only clears the inbox entry.
-- KEYS  1 in (stream)  2 req:<id>  3 hist
-- ARGV  1 id  2 inbox entry id  3 stage  4 score (lower is served first)  5 prompt_tokens  6 max_tokens
--       7 packed token ids  8 plan version  9 length bucket  10 why this stage (JSON, '' = nothing to say)
--       11 charge_tokens ('' = prompt and max_tokens)  12 body (JSON, '' = as submitted)
-- Notes when a request that is not background last came to the stage: workers then hold back the others.
-- Returns 'OK' | 'DUP'
redis.call('XACK', KEYS[1], 'd', ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
local v = redis.call('HMGET', KEYS[2], 'state', 'charge_tokens', 'charge_bytes')
if v[1] ~= 'submitted' then return 'DUP' end
local what = fault(ARGV[1])
if what then
  condemn(ARGV[1], what)
  return 'DUP'
end
local tokens = tonumber(ARGV[11]) or ARGV[5] + ARGV[6]
redis.call('HDEL', KEYS[2], 'prompt', 'entry')
redis.call('HSET', KEYS[2], 'state', 'queued', 'stage', ARGV[3], 'score', ARGV[4], 'prompt_tokens', ARGV[5],
  'max_tokens', ARGV[6], 'ids', ARGV[7], 'plan', ARGV[8], 'charge_tokens', int(tokens), 'queued_ms', int(now_ms()))
redis.call('HINCRBY', P .. 'counts', 'live_tokens', int(tokens - v[2]))
redis.call('HINCRBY', P .. 'counts', 'prompt_tokens', ARGV[5])
redis.call('HINCRBY', KEYS[3], 'a:' .. ARGV[9], 1)
redis.call('HINCRBY', KEYS[3], 'p:' .. ARGV[9], ARGV[5])
if tonumber(ARGV[4]) < BACKGROUND and string.sub(ARGV[3], 1, 1) ~= '@' then
  redis.call('HSET', P .. 'foreground', ARGV[3], int(now_ms()))
end
if ARGV[10] ~= '' then redis.call('HSET', KEYS[2], 'why', ARGV[10]) end
if ARGV[12] ~= '' then redis.call('HSET', KEYS[2], 'body', ARGV[12]) end
charge(KEYS[2], footprint(KEYS[2]) - (v[3] or 0))
enqueue(ARGV[1], ARGV[3], ARGV[4], tonumber(ARGV[5]))
return 'OK'
