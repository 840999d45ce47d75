-- Asks the holder of a batch's lease, or the next one, to cancel it.
-- KEYS  1 batch:<id>
-- Returns 'OK' (also where it was asked before) | 'IS:<state>' (too late) | 'UNKNOWN'
local batch = KEYS[1]
local state = redis.call('HGET', batch, 'state')
if not state then return 'UNKNOWN' end
if state ~= 'validating' and state ~= 'in_progress' then return 'IS:' .. state end
redis.call('HSETNX', batch, 'cancelling_ms', int(now_ms()))
return 'OK'
