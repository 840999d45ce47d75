-- Sets aside those of the keys that are of another type than ours: foreign:<name>, for a week, and a dead letter.
-- KEYS  1.. any keys
-- ARGV  none
-- Returns the number set aside
local n = 0
for _, key in ipairs(KEYS) do
  if set_aside(key) then n = n + 1 end
end
return n
