-- Packs requests that ended a while ago: the output into few entries, the record into a small hash; notes what they
-- keep. An output stream costs 4 kB however short it is, a large hash 60 bytes a field: after this neither does.
-- A packed entry has the fields of its entries joined, and 'c' with their bounds: for each entry its number of tokens
-- and of bytes of text, as varints of 7 bits, the lowest first. The end stays an entry of its own. Only what a client
-- submitted that knows bounds is joined. Safe to repeat; a long output takes several calls.
-- KEYS  1 finished (stream)  2 packed (string: id of the last entry of `finished` that is done)  3 results (zset)
-- ARGV  1 least age (ms): readers of an earlier release, which know no bounds, have the end by then
--       2 most requests  3 most output entries, about
-- Returns {requests packed, 1 when there is more to do at once}
local finished, packed, results = unpack(KEYS)
local grace_ms, most, room = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local PAGE, SMALL = 500, 40000
local UNUSED = {kind = 1, charge_tokens = 1, charge_bytes = 1, client = 1, solo_crashes = 1, score = 1, kv = 1,
  from = 1, moved_ms = 1, ttl_ms = 1, owner = 1, followers = 1, cancel = 1, bounds = 1, held = 1}
local LONG = {why = 1, ledger = 1}

-- A number as a varint.
local function varint(n)
  local bytes = ''
  while n >= 128 do
    bytes = bytes .. string.char(n % 128 + 128)
    n = math.floor(n / 128)
  end
  return bytes .. string.char(n)
end

-- The fields of an entry of a stream by their names.
local function values_of(row)
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
    local v = values_of(row)
    local t, x, l = v.t or '', v.x or '', v.l or ''
    upto, width = upto or tokens_of(row[1]) - #t / 4, width or #l / #t
    if v.c or t == '' or tokens_of(row[1]) ~= upto + #t / 4 or #l / #t ~= width or width % 2 ~= 0 then return nil end
    upto, lows[i], highs[i] = tokens_of(row[1]), string.sub(l, 1, #l / 2), string.sub(l, #l / 2 + 1)
    ids[i], texts[i], bounds[i] = t, x, varint(#t / 4) .. varint(#x)
  end
  local entry = {'t', table.concat(ids), 'x', table.concat(texts), 'c', table.concat(bounds)}
  if width > 0 then entry[7], entry[8] = 'l', table.concat(lows) .. table.concat(highs) end
  local cached = values_of(rows[1]).k
  if cached then entry[#entry + 1], entry[#entry + 2] = 'k', cached end
  return entry
end

-- Packs the next page of an output. Returns whether that was the last one, and how many entries were read.
local function pack_output(out, made)
  local last = redis.call('XREVRANGE', made, '+', '-', 'COUNT', 1)[1]
  local from = last and '(' .. int(tokens_of(last[1])) .. '-0' or '-'
  local rows = redis.call('XRANGE', out, from, '+', 'COUNT', PAGE)
  local num_read, ended = #rows, nil
  if num_read > 0 and values_of(rows[num_read]).e then ended = table.remove(rows) end
  if #rows > 0 then
    local entry = joined(rows)
    if not entry then
      redis.call('DEL', made)
      return true, num_read
    end
    redis.call('XADD', made, rows[#rows][1], unpack(entry))
  end
  if ended then
    local v = values_of(ended)  -- what it tells of the record stands there
    redis.call('XADD', made, ended[1], 'e', v.e, 'x', v.x or '')
  end
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
    for _, value in pairs(values_of(row)) do bytes = bytes + #value end
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
local function pack_record(record)
  local all, kept, is_small = redis.call('HGETALL', record), {}, true
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
  redis.call('DEL', record)
  redis.call('HSET', record, unpack(kept))
end

-- Packs a request, or the next page of its output. Returns whether it is done, and how many entries were read.
local function pack(id)
  local record, out, made = P .. 'req:' .. id, P .. 'out:' .. id, P .. 'pack:' .. id
  local request = fields(record, {'finished_ms', 'kept_bytes', 'key_ttl_ms', 'bounds', 'read_ms'})
  if not request.finished_ms or request.kept_bytes then return true, 1 end
  local is_whole, num_read = true, 1
  if request.bounds then is_whole, num_read = pack_output(out, made) end
  if not is_whole then return false, num_read end
  local bytes, now, ttl = place(out, made), now_ms(), redis.call('PTTL', record)
  local until_ms = now + math.max(ttl, redis.call('PTTL', out))
  if request.key_ttl_ms then ttl = math.max(ttl, request.finished_ms + request.key_ttl_ms - now) end
  pack_record(record)
  redis.call('HSET', record, 'kept_bytes', 0)
  bytes = bytes + footprint(record)
  redis.call('HSET', record, 'kept_bytes', int(bytes))
  redis.call('PEXPIRE', record, int(math.max(1, ttl)))
  redis.call('ZADD', results, int(until_ms), id .. ' ' .. int(bytes))
  if whole(request.read_ms) then redis.call('ZADD', P .. 'read', request.read_ms, id .. ' ' .. int(bytes)) end
  redis.call('HINCRBY', P .. 'counts', 'result_bytes', int(bytes))
  given(id)
  return true, num_read
end

redis.call('DEL', P .. 'pack:')  -- needs no memory: a full server refuses a script whose first write does
local last, now = string.match(redis.call('GET', packed) or '', '^%d+%-%d+$'), now_ms()
local ended_ms = tokens_of  -- entries of `finished` have the time before the dash
if redis.call('XLEN', finished) >= 10000 then  -- requests end so fast that `finished` would lose them
  grace_ms = math.min(grace_ms, (now - ended_ms(redis.call('XRANGE', finished, '-', '+', 'COUNT', 1)[1][1])) / 2)
end
local num_packed, more = 0, 0
local rows = last and redis.pcall('XRANGE', finished, '(' .. last, '+', 'COUNT', most) or {}
if rows.err or #rows == 0 then  -- all is done, or the mark is not one of ours
  local newest = redis.call('XREVRANGE', finished, '+', '-', 'COUNT', 1)[1]
  if newest and newest[1] ~= last then rows = redis.call('XRANGE', finished, '-', '+', 'COUNT', most) end
end
for _, row in ipairs(rows) do
  local age = now - ended_ms(row[1])
  if age < grace_ms and age > -3600000 then break end  -- a clock that was an hour ahead is no reason to wait for it
  if room <= 0 then
    more = 1
    break
  end
  local is_ours, is_done, num_read
  repeat
    is_ours, is_done, num_read = pcall(pack, values_of(row).i or '')
    if not is_ours then is_done, num_read = true, 1 end  -- foreign keys or entries: they expire as they are
    room = room - num_read
  until is_done or room <= 0
  if not is_done then
    more = 1
    break
  end
  num_packed, last = num_packed + 1, row[1]
end
if num_packed > 0 then redis.call('SET', packed, last) end
if num_packed == #rows and num_packed == most then more = 1 end
return {num_packed, more}
