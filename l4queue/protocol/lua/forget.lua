-- Removes dispatchers from the inbox group that were not seen for long and have nothing pending; one that is
-- alive after all appears again with its next read.
-- KEYS  1 in (stream)
-- ARGV  1 unseen for (ms)
-- Returns the number removed
local consumers, n = redis.pcall('XINFO', 'CONSUMERS', KEYS[1], 'd'), 0
if consumers.err then return 0 end
for _, row in ipairs(consumers) do
  local fact = {}
  for i = 1, #row, 2 do fact[row[i]] = row[i + 1] end
  if fact.pending == 0 and fact.idle >= tonumber(ARGV[1]) then
    redis.call('XGROUP', 'DELCONSUMER', KEYS[1], 'd', fact.name)
    n = n + 1
  end
end
return n
