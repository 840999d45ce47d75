-- Removes dispatchers from the inbox group that were not seen for long and have nothing pending; one that is
-- alive after all appears again with its next read.
-- KEYS  1 in (stream)
-- ARGV  1 unseen for (ms)
-- Returns the number removed
local inbox, unseen_ms = KEYS[1], tonumber(ARGV[1])
local rows, num_removed = redis.pcall('XINFO', 'CONSUMERS', inbox, 'd'), 0
if rows.err then return 0 end
for _, row in ipairs(rows) do
  local consumer = {}
  for i = 1, #row, 2 do consumer[row[i]] = row[i + 1] end
  if consumer.pending == 0 and consumer.idle >= unseen_ms then
    redis.call('XGROUP', 'DELCONSUMER', inbox, 'd', consumer.name)
    num_removed = num_removed + 1
  end
end
return num_removed
