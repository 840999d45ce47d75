-- Publishes a plan by compare-and-set on its version, and keeps it in the history.
-- KEYS  1 plan (hash)  2 plans (stream)
-- ARGV  1 version it replaces  2 version  3 body (JSON)
-- Returns 'OK' | 'DUP' | 'STALE:<version>'
local plan_key, plans = unpack(KEYS)
local replaced, version, body = unpack(ARGV)
local plan = fields(plan_key, {'version', 'body'})
local current = whole(plan.version) and plan.version or '0'
if current == version and plan.body == body then return 'DUP' end
if current ~= replaced then return 'STALE:' .. current end
redis.call('HSET', plan_key, 'version', version, 'body', body, 'published_ms', int(now_ms()))
redis.call('XADD', plans, 'MAXLEN', '~', 256, '*', 'version', version, 'body', body)
return 'OK'
