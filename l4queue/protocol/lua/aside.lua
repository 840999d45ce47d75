-- Sets aside those of the keys that are of another type than ours, and streams to which nothing can be added any more:
-- foreign:<name>, for a week, and a dead letter.
-- KEYS  1.. any keys
-- ARGV  none
-- Returns the number set aside
local num_aside = 0
for _, key in ipairs(KEYS) do
  local last = redis.pcall('XREVRANGE', key, '+', '-', 'COUNT', 1)
  local is_full = last[1] and last[1][1] == '18446744073709551615-18446744073709551615'
  if set_aside(key, is_full) then num_aside = num_aside + 1 end
end
return num_aside
