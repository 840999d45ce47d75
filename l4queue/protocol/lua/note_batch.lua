-- Notes what the holder of a batch's lease has done: fields of its record, parts of its files, its end.
-- KEYS  1 batch:<id>  2 parts:<id> (hash: part -> lines)  3 open:<store> (zset)
-- ARGV  1 id  2 token of the holder  3 ms for which an ended batch is kept ('' = it goes on)  4 number of fields n
--       then n names, each with its value; then names of parts, each with its number of lines
-- Returns 'OK' | 'LOST' (another has the lease) | 'UNKNOWN'
local batch, parts, open = unpack(KEYS)
local id, token, keep_ms, num_fields = unpack(ARGV)
local found = fields(batch, {'state', 'holder', 'ended_ms'})
if not found.state then return 'UNKNOWN' end
if found.holder ~= token or found.ended_ms and keep_ms == '' then return 'LOST' end
local first = 5 + 2 * num_fields
for i = 5, first - 1, 2 do redis.call('HSET', batch, ARGV[i], ARGV[i + 1]) end
for i = first, #ARGV, 2 do redis.call('HSET', parts, ARGV[i], ARGV[i + 1]) end
if keep_ms ~= '' then
  redis.call('HSETNX', batch, 'ended_ms', int(now_ms()))
  redis.call('PEXPIRE', batch, keep_ms)
  redis.call('DEL', parts)
  redis.call('ZREM', open, id)
end
return 'OK'
