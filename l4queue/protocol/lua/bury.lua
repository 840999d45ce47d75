-- Puts a value that a reader could not read among the dead letters: once a day, by any process.
-- KEYS  1 dead (stream)  2 counts  3 buried:<digest> (string)
-- ARGV  1 name of the key that it is under  2 why  3 its first bytes
-- Returns 1 | 0 (it is there already)
local _, counts, buried = unpack(KEYS)
local name, why, bytes = unpack(ARGV)
if redis.call('EXISTS', buried) == 1 then return 0 end
redis.call('SET', buried, '1', 'PX', 86400000)
bury(name, why, bytes)
redis.call('HINCRBY', counts, 'unreadable', 1)
return 1
