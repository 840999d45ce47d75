-- Puts what a reader could not read among the dead letters: once a day, whoever finds it.
-- KEYS  1 dead (stream)  2 counts  3 buried:<digest> (string)
-- ARGV  1 name of the key that it is under  2 why  3 its first bytes
-- Returns 1 | 0 (it is there already)
if redis.call('EXISTS', KEYS[3]) == 1 then return 0 end
redis.call('SET', KEYS[3], '1', 'PX', 86400000)
bury(ARGV[1], ARGV[2], ARGV[3])
redis.call('HINCRBY', KEYS[2], 'unreadable', 1)
return 1
