-- Passes a wake-up on: to the workers named, or where none is, to the lightest that is ready if anything waits.
-- KEYS  1 q:<stage> (zset)
-- ARGV  1 stage  2.. incarnations
-- Returns 'OK'
local queue, stage = KEYS[1], ARGV[1]
if redis.call('EXISTS', queue) == 0 then return 'OK' end
for i = 2, #ARGV do ring(ARGV[i], 's', stage, '') end
if #ARGV == 1 then wake_ready(stage, '', 1) end
return 'OK'
