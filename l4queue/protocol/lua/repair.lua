-- Proves that a live record has an inbox entry, a queue entry or a lease, and mends it where it has none.
-- The other scripts keep this true; a repair is an alarm that something else wrote to these keys.
-- A record from the future is that of a clock that has gone back: its times, its deadline and its place in the order
-- go back as far, once. That is no alarm.
-- KEYS  1 req:<id>  2 in (stream)  3 workers (zset)
-- ARGV  1 id  2 least age of a submitted request that counts as forgotten (ms)
-- Returns 'FINE' | 'INBOX' | 'QUEUE' | 'LEASE' (what was missing) | 'RECORD' (it cannot be read: failed)
local function mended(what)
  redis.call('HINCRBY', P .. 'counts', 'repairs', 1)
  return what
end
local v = redis.call('HMGET', KEYS[1], 'state', 'owner', 'stage', 'score', 'prompt_tokens', 'offset',
  'submitted_ms', 'entry')
local what = (v[1] == 'submitted' or v[1] == 'queued' or v[1] == 'running') and fault(ARGV[1])
if what then
  condemn(ARGV[1], what)
  return mended('RECORD')
end
local ahead = (tonumber(v[7]) or 0) - now_ms()
if ahead > 1000 and (v[1] == 'submitted' or v[1] == 'queued' or v[1] == 'running') then
  redis.call('HDEL', KEYS[1], '-')
  for _, name in ipairs({'submitted_ms', 'queued_ms', 'started_ms', 'first_token_ms', 'moved_ms', 'deadline_ms'}) do
    local ms = redis.call('HGET', KEYS[1], name)
    if ms then redis.call('HSET', KEYS[1], name, int(ms - ahead)) end
  end
  if redis.call('ZSCORE', P .. 'deadlines', ARGV[1]) then
    redis.call('ZINCRBY', P .. 'deadlines', int(-ahead), ARGV[1])
  end
  if v[4] then
    v[4] = string.format('%.17g', v[4] - ahead)
    redis.call('HSET', KEYS[1], 'score', v[4])
    if v[3] and redis.call('ZSCORE', P .. 'q:' .. v[3], ARGV[1]) then
      redis.call('ZADD', P .. 'q:' .. v[3], 'XX', v[4], ARGV[1])
    end
  end
end
if v[1] == 'submitted' then
  if now_ms() - (tonumber(v[7]) or 0) < tonumber(ARGV[2]) then return 'FINE' end
  if v[8] and #redis.pcall('XRANGE', KEYS[2], v[8], v[8]) > 0 then return 'FINE' end
  redis.call('HDEL', KEYS[1], 'entry')
  redis.call('HSET', KEYS[1], 'entry', redis.call('XADD', KEYS[2], '*', 'i', ARGV[1]))
  return mended('INBOX')
elseif v[1] == 'queued' then
  if redis.call('ZSCORE', P .. 'q:' .. v[3], ARGV[1]) then return 'FINE' end
  redis.call('HDEL', KEYS[1], 'owner')
  enqueue(ARGV[1], v[3], v[4], tonumber(v[5]) + tonumber(v[6]))
  return mended('QUEUE')
elseif v[1] == 'running' then
  local owner = v[2] or ''
  if redis.call('ZSCORE', KEYS[3], owner) and redis.call('SISMEMBER', P .. 'held:' .. owner, ARGV[1]) == 1 then
    return 'FINE'
  end
  redis.call('SREM', P .. 'held:' .. owner, ARGV[1])
  requeue(ARGV[1], '', '', {what = 'repaired'})
  return mended('LEASE')
end
return 'FINE'
