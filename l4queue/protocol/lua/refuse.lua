-- Ends a request that can never run, or an inbox entry that cannot be read. submitted -> failed
-- KEYS  1 in (stream)  2 req:<id>  3 dead (stream)
-- ARGV  1 id  2 inbox entry id  3 error  4 field at fault ('' = none)  5 bytes of an undecodable entry ('' = none)
--       6 reason (invalid | too_long)
-- Returns 'OK' | 'DUP'
local inbox, record = unpack(KEYS)
local id, entry, why, field, bytes, reason = unpack(ARGV)
redis.call('XACK', inbox, 'd', entry)
local is_first = redis.call('XDEL', inbox, entry) == 1
if bytes ~= '' and is_first then bury(id, why, bytes) end
if redis.call('HGET', record, 'state') ~= 'submitted' then return 'DUP' end
settle(id, 'failed', '', {'error', why, 'field', field, 'finish_reason', reason})
return 'OK'
