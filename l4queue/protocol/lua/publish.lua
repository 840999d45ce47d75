-- Publishes a plan by compare-and-set on its version, and keeps it in the history.
-- KEYS  1 plan (hash)  2 plans (stream)
-- ARGV  1 version it replaces  2 version  3 body (JSON)
-- Returns 'OK' | 'DUP' | 'STALE:<version>'
local v = redis.call('HMGET', KEYS[1], 'version', 'body')
local version = whole(v[1]) and v[1] or '0'
if version == ARGV[2] and v[2] == ARGV[3] then return 'DUP' end
if version ~= ARGV[1] then return 'STALE:' .. version end
redis.call('HSET', KEYS[1], 'version', ARGV[2], 'body', ARGV[3], 'published_ms', int(now_ms()))
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 256, '*', 'version', ARGV[2], 'body', ARGV[3])
return 'OK'
