-- Sends a message to a live worker: a sibling asks it for running requests.
-- KEYS  1 workers (zset)  2 ctl:<incarnation> (stream)
-- ARGV  1 incarnation  2 message (JSON)
-- Returns 'OK' | 'LOST' (no such worker)
if not redis.call('ZSCORE', KEYS[1], ARGV[1]) then return 'LOST' end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', 256, '*', 'm', ARGV[2])
redis.call('PEXPIRE', KEYS[2], 600000)
return 'OK'
