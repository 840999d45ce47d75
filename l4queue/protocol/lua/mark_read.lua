-- Notes that clients have the results of requests: these go first when results have to go for want of room.
-- KEYS  1 read (zset: "<id> <bytes>" of a packed result -> when it was read, ms)
-- ARGV  1.. ids
-- Returns how many were noted: those that have ended and were not noted before
local read, now, num_noted = KEYS[1], int(now_ms()), 0
redis.call('ZREM', read, '')  -- needs no memory: a full server refuses a script whose first write does
for _, id in ipairs(ARGV) do
  local record = P .. 'req:' .. id
  local request = fields(record, {'finished_ms', 'kept_bytes', 'read_ms'})
  if request.finished_ms and not request.read_ms then
    redis.call('HSET', record, 'read_ms', now)
    if whole(request.kept_bytes) then redis.call('ZADD', read, now, id .. ' ' .. request.kept_bytes) end
    num_noted = num_noted + 1
  end
end
return num_noted
