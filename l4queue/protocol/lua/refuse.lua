-- Ends a request that can never run, or an inbox entry that cannot be read. submitted -> failed
-- KEYS  1 in (stream)  2 req:<id>  3 dead (stream)
-- ARGV  1 id  2 inbox entry id  3 error  4 field at fault ('' = none)  5 bytes of an undecodable entry ('' = none)
--       6 reason (invalid | too_long)
-- Returns 'OK' | 'DUP'
redis.call('XACK', KEYS[1], 'd', ARGV[2])
local is_first = redis.call('XDEL', KEYS[1], ARGV[2]) == 1
if ARGV[5] ~= '' and is_first then
  bury(ARGV[1], ARGV[3], ARGV[5])
end
if redis.call('HGET', KEYS[2], 'state') ~= 'submitted' then return 'DUP' end
settle(ARGV[1], 'failed', '', {'error', ARGV[3], 'field', ARGV[4], 'finish_reason', ARGV[6]})
return 'OK'
