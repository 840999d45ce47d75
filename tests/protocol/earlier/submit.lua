-- Accepts a request: record and inbox entry in one step. (absent) -> submitted
-- Safe to repeat: the second call answers DUP.
-- KEYS  1 counts  2 in (stream)  3 req:<id> (hash)
-- ARGV  1 id  2 digest ('' = none)  3 body (JSON)  4 kind (p text, m messages, t packed ids)  5 prompt
--       6 charge_tokens (estimate)  7 charge_bytes  8 bound of live tokens  9 bound of live bytes
--       10 deadline (ms from now, 0 = none)  11 result TTL (ms)  12 client id ('' = no mailbox)
-- Returns {'OK', ms} | {'DUP', state} | {'CONFLICT', state} | {'FULL', live tokens, drained tokens/s}
local known = redis.call('HMGET', KEYS[3], 'state', 'digest')
if known[1] then
  if known[2] ~= ARGV[2] then return {'CONFLICT', known[1]} end
  return {'DUP', known[1]}
end
local v = redis.call('HMGET', KEYS[1], 'live_tokens', 'live_bytes', 'drain_tokens_per_s')
local tokens, bytes = tonumber(v[1] or 0), tonumber(v[2] or 0)
if tokens > 0 and tokens + ARGV[6] > tonumber(ARGV[8]) or bytes > 0 and bytes + ARGV[7] > tonumber(ARGV[9]) then
  redis.pcall('HINCRBY', KEYS[1], 'rejected', 1)  -- pcall: a server out of memory may refuse to count, not to answer
  return {'FULL', int(tokens), v[3] or '0'}
end
local t = now_ms()
local entry = redis.call('XADD', KEYS[2], '*', 'i', ARGV[1])
redis.call('HSET', KEYS[3], 'state', 'submitted', 'entry', entry, 'digest', ARGV[2], 'body', ARGV[3], 'kind', ARGV[4],
  'prompt', ARGV[5], 'charge_tokens', ARGV[6], 'charge_bytes', ARGV[7], 'ttl_ms', ARGV[11],
  'client', ARGV[12], 'submitted_ms', int(t), 'epoch', 0, 'offset', 0, 'crashes', 0, 'solo_crashes', 0)
if ARGV[10] ~= '0' then
  redis.call('HSET', KEYS[3], 'deadline_ms', int(t + ARGV[10]))
  redis.call('ZADD', P .. 'deadlines', int(t + ARGV[10]), ARGV[1])
end
redis.call('HINCRBY', KEYS[1], 'live', 1)
redis.call('HINCRBY', KEYS[1], 'live_tokens', ARGV[6])
redis.call('HINCRBY', KEYS[1], 'live_bytes', ARGV[7])
redis.call('HINCRBY', KEYS[1], 'submitted', 1)
return {'OK', int(t)}
