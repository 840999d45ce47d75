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
--       16 greatest of the packed ids ('' = no ids): who routes them need not read them
-- The inbox entry has what a dispatcher has to know, where that is short: it reads the record only of long texts.
-- Returns {'OK', ms, id} | {'DUP', state, id} | {'CONFLICT', state, id} | {'FULL', live tokens, drained tokens/s}
local counts, inbox, first_record = unpack(KEYS)
local first_id, digest, body, kind, prompt = unpack(ARGV, 1, 5)
local charge_tokens, charge_bytes = tonumber(ARGV[6]), tonumber(ARGV[7])
local max_tokens, max_bytes, deadline_ms = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])
local ttl_ms, client, canonical, key_ttl_ms, has_open_end = ARGV[11], ARGV[12], ARGV[13], ARGV[14], ARGV[15] == '1'
local greatest = ARGV[16] or ''
local SHORT = 2048  -- bytes of body and text. Chosen: what a round trip for them would cost is more than their copy
local is_keyed = key_ttl_ms ~= ''

-- What the inbox entry tells beside the id, and its bytes: all, or where that is long only how long it is.
local function facts(now)
  local told, bytes = {'k', kind, 'y', body, 's', int(now), 'o', ARGV[15]}, #body + 100
  if greatest ~= '' then
    told[9], told[10], told[11], told[12] = 'n', int(#prompt / 4), 'g', greatest
  else
    told[9], told[10], bytes = 'p', prompt, bytes + #prompt
  end
  if bytes > SHORT then return {'b', int(#body + #prompt)}, 20 end
  return told, bytes
end

-- The answer to a request whose record is there; nil where it is not.
local function look(id, record)
  local state, its_digest, its_canonical = unpack(redis.call('HMGET', record, 'state', 'digest', 'canonical'))
  if not state then return nil end
  local is_same = its_digest == digest or canonical ~= '' and its_canonical == canonical
  return {is_same and 'DUP' or 'CONFLICT', state, id}
end

local known = look(first_id, first_record)
if not known and is_keyed then
  local later = redis.call('GET', P .. 'key:' .. first_id)
  if later then known = look(later, P .. 'req:' .. later) end
end
if known then return known end

local tokens, bytes, drained, submitted = unpack(redis.call('HMGET', counts, 'live_tokens', 'live_bytes',
  'drain_tokens_per_s', 'submitted'))
tokens, bytes = counted('live_tokens', tokens), counted('live_bytes', bytes)
if tokens > 0 and tokens + charge_tokens > max_tokens or bytes > 0 and bytes + charge_bytes > max_bytes then
  redis.pcall('HINCRBY', counts, 'rejected', 1)  -- pcall: a server out of memory may refuse to count, not to answer
  return {'FULL', int(tokens), drained and string.find(drained, '^%d+%.?%d*$') and drained or '0'}
end

local now, id, record = now_ms(), first_id, first_record
count('submitted', 1)
if is_keyed and given(id) then
  id = id .. '-' .. int(counted('submitted', submitted))
  record = P .. 'req:' .. id
  redis.call('SET', P .. 'key:' .. first_id, id, 'PX', 2592000000)  -- from the end on as long as the record
end
local told, told_bytes = facts(now)
local entry = redis.call('XADD', inbox, '*', 'i', id, unpack(told))
redis.call('HSET', record, 'state', 'submitted', 'entry', entry, 'digest', digest, 'body', body, 'kind', kind,
  'prompt', prompt, 'charge_tokens', charge_tokens, 'charge_bytes', 0, 'ttl_ms', ttl_ms,
  'client', client, 'submitted_ms', int(now), 'epoch', 0, 'offset', 0, 'crashes', 0, 'solo_crashes', 0,
  'bounds', 1)  -- its client knows packed outputs
if canonical ~= '' then redis.call('HSET', record, 'canonical', canonical) end
if is_keyed then redis.call('HSET', record, 'key_ttl_ms', key_ttl_ms) end
if has_open_end then redis.call('HSET', record, 'open_end', 1) end
if deadline_ms ~= 0 then
  redis.call('HSET', record, 'deadline_ms', int(now + deadline_ms))
  redis.call('ZADD', P .. 'deadlines', int(now + deadline_ms), id)
end
charge(record, footprint(record) + told_bytes)
count('live', 1)
count('live_tokens', charge_tokens)
return {'OK', int(now), id}
