-- Packs requests that ended a while ago: the output into few entries, the record into a small hash; notes what they
-- keep. An output stream costs 4 kB however short it is, a large hash 60 bytes a field: after this neither does.
-- A packed entry has the fields of its entries joined, and 'c' with their bounds: for each entry its number of tokens
-- and of bytes of text, as varints of 7 bits, the lowest first. The end stays an entry of its own. Only what a client
-- submitted that knows bounds is joined. Safe to repeat; a long output takes several calls.
-- KEYS  1 finished (stream)  2 packed (string: id of the last entry of `finished` that is done)  3 results (zset)
-- ARGV  1 least age (ms): readers of an earlier release, which know no bounds, have the end by then
--       2 most requests  3 most output entries, about
-- Returns {requests packed, 1 when there is more to do at once}
local PAGE, SMALL = 500, 40000
local UNUSED = {kind = 1, charge_tokens = 1, charge_bytes = 1, client = 1, solo_crashes = 1, score = 1, kv = 1,
  from = 1, moved_ms = 1, ttl_ms = 1, owner = 1, followers = 1, cancel = 1, bounds = 1}
local LONG = {why = 1, ledger = 1}

local function varint(n)
  local bytes = ''
  while n >= 128 do
    bytes = bytes .. string.char(n % 128 + 128)
    n = math.floor(n / 128)
  end
  return bytes .. string.char(n)
end

local function fields_of(row)
  local values = {}
  for i = 1, #row[2], 2 do values[row[2][i]] = row[2][i + 1] end
  return values
end

local function tokens_of(entry_id) return tonumber(string.match(entry_id, '^%d+')) end

-- One entry for all these, as arguments of XADD; nil where they are not to be joined: packed already, not one after the
-- other, or with logprobs of other widths.
local function joined(rows)
  local ids, texts, bounds, lows, highs, upto, width = {}, {}, {}, {}, {}, nil, nil
  for i, row in ipairs(rows) do
    local v = fields_of(row)
    local t, x, l = v.t or '', v.x or '', v.l or ''
    upto, width = upto or tokens_of(row[1]) - #t / 4, width or #l / #t
    if v.c or t == '' or tokens_of(row[1]) ~= upto + #t / 4 or #l / #t ~= width or width % 2 ~= 0 then return nil end
    upto, lows[i], highs[i] = tokens_of(row[1]), string.sub(l, 1, #l / 2), string.sub(l, #l / 2 + 1)
    ids[i], texts[i], bounds[i] = t, x, varint(#t / 4) .. varint(#x)
  end
  local entry = {'t', table.concat(ids), 'x', table.concat(texts), 'c', table.concat(bounds)}
  if width > 0 then entry[7], entry[8] = 'l', table.concat(lows) .. table.concat(highs) end
  return entry
end

-- Packs the next page of an output. Returns whether that was the last one, and how many entries were read.
local function pack_output(out, made)
  local last = redis.call('XREVRANGE', made, '+', '-', 'COUNT', 1)[1]
  local from = last and '(' .. int(tokens_of(last[1])) .. '-0' or '-'
  local rows = redis.call('XRANGE', out, from, '+', 'COUNT', PAGE)
  local num_read, ended = #rows, nil
  if num_read > 0 and fields_of(rows[num_read]).e then ended = table.remove(rows) end
  if #rows > 0 then
    local entry = joined(rows)
    if not entry then
      redis.call('DEL', made)
      return true, num_read
    end
    redis.call('XADD', made, rows[#rows][1], unpack(entry))
  end
  if ended then redis.call('XADD', made, ended[1], unpack(ended[2])) end
  redis.call('PEXPIRE', made, 60000)
  return ended or num_read < PAGE, num_read
end

-- Puts the packed output in its place, without the room that a stream is given to grow. Returns its bytes.
local function place(out, made)
  local ttl, bytes = redis.call('PTTL', out), 0
  if ttl <= 0 then
    redis.call('DEL', made)
    return 0
  end
  if redis.call('EXISTS', made) == 1 then
    redis.call('RENAME', made, out)
    redis.call('PEXPIRE', out, ttl)
  end
  for _, row in ipairs(redis.call('XRANGE', out, '-', '+')) do
    bytes = bytes + 40
    for _, value in pairs(fields_of(row)) do bytes = bytes + #value end
  end
  if bytes < SMALL then
    -- pcall: a server may not allow it; then the stream keeps its room
    local reply = redis.pcall('RESTORE', out, ttl, redis.call('DUMP', out), 'REPLACE')
    if reply.err then bytes = bytes + 4096 end
  end
  return 1.1 * bytes + 370  -- what is given out comes in sizes
end

-- Writes the record anew without what only a live request needs: small enough, it is stored in one piece. Long texts
-- are cut for that where nothing else is long, and the first release does not need them.
local function pack_record(rk)
  local all, kept, is_small = redis.call('HGETALL', rk), {}, true
  for i = 1, #all, 2 do
    if #all[i + 1] > 64 and (not LONG[all[i]] or #all[i + 1] > 1024) then is_small = false end
  end
  for i = 1, #all, 2 do
    local name, value = all[i], all[i + 1]
    if UNUSED[name] or value == '' and name ~= 'digest' then
    elseif is_small and #value > 64 then
      for piece = 1, math.ceil(#value / 64) do
        kept[#kept + 1] = name .. ':' .. piece
        kept[#kept + 1] = string.sub(value, piece * 64 - 63, piece * 64)
      end
    else
      kept[#kept + 1], kept[#kept + 2] = name, value
    end
  end
  redis.call('DEL', rk)
  redis.call('HSET', rk, unpack(kept))
end

local function pack(id)
  local rk, out, made = P .. 'req:' .. id, P .. 'out:' .. id, P .. 'pack:' .. id
  local v = redis.call('HMGET', rk, 'finished_ms', 'kept_bytes', 'key_ttl_ms', 'bounds')
  if not v[1] or v[2] then return true, 1 end
  local is_whole, num_read = true, 1
  if v[4] then is_whole, num_read = pack_output(out, made) end
  if not is_whole then return false, num_read end
  local bytes, t, ttl = place(out, made), now_ms(), redis.call('PTTL', rk)
  local until_ms = t + math.max(ttl, redis.call('PTTL', out))
  if v[3] then ttl = math.max(ttl, v[1] + v[3] - t) end
  pack_record(rk)
  redis.call('HSET', rk, 'kept_bytes', 0)
  bytes = bytes + footprint(rk)
  redis.call('HSET', rk, 'kept_bytes', int(bytes))
  redis.call('PEXPIRE', rk, int(math.max(1, ttl)))
  redis.call('ZADD', KEYS[3], int(until_ms), id .. ' ' .. int(bytes))
  redis.call('HINCRBY', P .. 'counts', 'result_bytes', int(bytes))
  given(id)
  return true, num_read
end

redis.call('DEL', P .. 'pack:')
local last, grace, t = string.match(redis.call('GET', KEYS[2]) or '', '^%d+%-%d+$'), tonumber(ARGV[1]), now_ms()
local ms = tokens_of
if redis.call('XLEN', KEYS[1]) >= 10000 then  -- so many end in so short a time that `finished` would lose them
  grace = math.min(grace, (t - ms(redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', 1)[1][1])) / 2)
end
local n, room, more = 0, tonumber(ARGV[3]), 0
local rows = last and redis.pcall('XRANGE', KEYS[1], '(' .. last, '+', 'COUNT', ARGV[2]) or {}
if rows.err or #rows == 0 then  -- all is done, or the mark is not one of ours
  local newest = redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', 1)[1]
  if newest and newest[1] ~= last then rows = redis.call('XRANGE', KEYS[1], '-', '+', 'COUNT', ARGV[2]) end
end
for _, row in ipairs(rows) do
  local age = t - ms(row[1])
  if age < grace and age > -3600000 then break end  -- a clock that was an hour ahead is no reason to wait for it
  if room <= 0 then
    more = 1
    break
  end
  local is_ours, is_done, num_read
  repeat
    is_ours, is_done, num_read = pcall(pack, fields_of(row).i or '')
    if not is_ours then is_done, num_read = true, 1 end  -- foreign keys or entries: they expire as they are
    room = room - num_read
  until is_done or room <= 0
  if not is_done then
    more = 1
    break
  end
  n, last = n + 1, row[1]
end
if n > 0 then redis.call('SET', KEYS[2], last) end
if n == #rows and n == tonumber(ARGV[2]) then more = 1 end
return {n, more}
