-- Ends a live request because somebody asked for it. submitted | queued | running -> cancelled
-- The same nonce gets the same answer, so a lost reply costs nothing.
-- KEYS  1 req:<id>
-- ARGV  1 id  2 reason  3 nonce ('' = none)
-- Returns 'OK' | 'UNKNOWN' | 'IS:<terminal state>'
local v = redis.call('HMGET', KEYS[1], 'state', 'cancel')
local state = v[1]
if not state then return 'UNKNOWN' end
if state == 'cancelled' and ARGV[3] ~= '' and v[2] == ARGV[3] then return 'OK' end
if state ~= 'submitted' and state ~= 'queued' and state ~= 'running' then return 'IS:' .. state end
settle(ARGV[1], 'cancelled', '', {'error', ARGV[2], 'cancel', ARGV[3]})
return 'OK'
