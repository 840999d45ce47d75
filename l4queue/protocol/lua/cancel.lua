-- Ends a live request because somebody asked for it. submitted | queued | running -> cancelled
-- KEYS  1 req:<id>
-- ARGV  1 id  2 reason
-- Returns 'OK' | 'UNKNOWN' | 'IS:<terminal state>'
local state = redis.call('HGET', KEYS[1], 'state')
if not state then return 'UNKNOWN' end
if state ~= 'submitted' and state ~= 'queued' and state ~= 'running' then return 'IS:' .. state end
settle(ARGV[1], 'cancelled', '', {'error', ARGV[2]})
return 'OK'
