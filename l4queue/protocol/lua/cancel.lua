-- Ends a live request because somebody asked for it. submitted | queued | running -> cancelled
-- The same nonce gets the same answer, so a lost reply costs nothing.
-- KEYS  1 req:<id>
-- ARGV  1 id  2 reason  3 nonce ('' = none)
-- Returns 'OK' | 'UNKNOWN' | 'IS:<terminal state>'
local record = KEYS[1]
local id, reason, nonce = unpack(ARGV)
local request = fields(record, {'state', 'cancel'})
local state = request.state
if not state then return 'UNKNOWN' end
if state == 'cancelled' and nonce ~= '' and request.cancel == nonce then return 'OK' end
if not is_live(state) then return 'IS:' .. state end
settle(id, 'cancelled', '', {'error', reason, 'cancel', nonce})
return 'OK'
