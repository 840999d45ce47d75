-- Accepts a request: record and inbox entry in one step. (absent) -> submitted
-- Safe to repeat: the second call answers DUP. An idempotency key is known until its request has ended and its time
-- has passed since; the id that it gets is made of it as long as that id was never given, and a new one afterwards.
-- KEYS  1 counts  2 in (stream)  3 req:<id> (hash)
-- ARGV  1 id, with an idempotency key its hash  2 digest ('' = no key)  3 body (JSON)
--       4 kind (p text, m messages, t packed ids)  5 prompt  6 charge_tokens (estimate)  7 charge_bytes (estimate)
--       8 bound of live tokens  9 bound of live bytes  10 deadline (ms from now, 0 = none)  11 result TTL (ms)
--       12 client id ('' = no mailbox)  13 digest without the order of keys ('' = the same as 2)
--       14 how long the key is known after the end (ms, '' = no key)
--       15 1 = max_tokens was left out: the dispatcher decides what still fits
-- Returns {'OK', ms, id} | {'DUP', state, id} | {'CONFLICT', state, id} | {'FULL', live tokens, drained tokens/s}
local id, rk, is_keyed = ARGV[1], KEYS[3], ARGV[14] ~= ''
local function look()
  local known = redis.call('HMGET', rk, 'state', 'digest', 'canonical')
  if not known[1] then return nil end
  if known[2] == ARGV[2] or ARGV[13] ~= '' and known[3] == ARGV[13] then return {'DUP', known[1], id} end
  return {'CONFLICT', known[1], id}
end
local known = look()
if not known and is_keyed then
  local later = redis.call('GET', P .. 'key:' .. ARGV[1])
  if later then
    id, rk = later, P .. 'req:' .. later
    known = look()
  end
end
if known then return known end
local v = redis.call('HMGET', KEYS[1], 'live_tokens', 'live_bytes', 'drain_tokens_per_s')
local tokens, bytes = whole(v[1]) or 0, whole(v[2]) or 0
if tokens > 0 and tokens + ARGV[6] > tonumber(ARGV[8]) or bytes > 0 and bytes + ARGV[7] > tonumber(ARGV[9]) then
  redis.pcall('HINCRBY', KEYS[1], 'rejected', 1)  -- pcall: a server out of memory may refuse to count, not to answer
  return {'FULL', int(tokens), v[3] and string.find(v[3], '^%d+%.?%d*$') and v[3] or '0'}
end
local t = now_ms()
local number = redis.call('HINCRBY', KEYS[1], 'submitted', 1)
id, rk = ARGV[1], KEYS[3]
if is_keyed and given(id) then
  id = id .. '-' .. int(number)
  rk = P .. 'req:' .. id
  redis.call('SET', P .. 'key:' .. ARGV[1], id, 'PX', 2592000000)  -- from the end on as long as the record
end
local entry = redis.call('XADD', KEYS[2], '*', 'i', id)
redis.call('HSET', rk, 'state', 'submitted', 'entry', entry, 'digest', ARGV[2], 'body', ARGV[3], 'kind', ARGV[4],
  'prompt', ARGV[5], 'charge_tokens', ARGV[6], 'charge_bytes', 0, 'ttl_ms', ARGV[11],
  'client', ARGV[12], 'submitted_ms', int(t), 'epoch', 0, 'offset', 0, 'crashes', 0, 'solo_crashes', 0,
  'bounds', 1)  -- whoever waits for it knows packed outputs
if ARGV[13] ~= '' then redis.call('HSET', rk, 'canonical', ARGV[13]) end
if is_keyed then redis.call('HSET', rk, 'key_ttl_ms', ARGV[14]) end
if ARGV[15] == '1' then redis.call('HSET', rk, 'open_end', 1) end
if ARGV[10] ~= '0' then
  redis.call('HSET', rk, 'deadline_ms', int(t + ARGV[10]))
  redis.call('ZADD', P .. 'deadlines', int(t + ARGV[10]), id)
end
charge(rk, footprint(rk))
redis.call('HINCRBY', KEYS[1], 'live', 1)
redis.call('HINCRBY', KEYS[1], 'live_tokens', ARGV[6])
return {'OK', int(t), id}
