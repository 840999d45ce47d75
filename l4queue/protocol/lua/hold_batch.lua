-- Takes or extends the lease of an unfinished batch: one gateway at a time runs it.
-- KEYS  1 batch:<id>
-- ARGV  1 token of the holder  2 lease (ms)  3 '1' = extend what it has, '0' = take it where nobody has it
-- Returns 'OK' | 'OK:<ms when it was asked to cancel>' | 'LOST' (another has it) | 'IS:<state>' (ended) | 'UNKNOWN'
local batch = KEYS[1]
local token, lease_ms, is_renewal = ARGV[1], tonumber(ARGV[2]), ARGV[3] == '1'
local found = fields(batch, {'state', 'holder', 'held_until_ms', 'ended_ms', 'cancelling_ms'})
if not found.state then return 'UNKNOWN' end
if found.ended_ms then return 'IS:' .. found.state end
local now = now_ms()
if found.holder ~= token and (is_renewal or (whole(found.held_until_ms) or 0) > now) then return 'LOST' end
redis.call('HSET', batch, 'holder', token, 'held_until_ms', int(now + lease_ms))
return found.cancelling_ms and 'OK:' .. found.cancelling_ms or 'OK'
