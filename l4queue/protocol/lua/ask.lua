-- Sends a message to a live worker: a sibling asks it for running requests.
-- KEYS  1 workers (zset)  2 ctl:<incarnation> (stream)
-- ARGV  1 incarnation  2 message (JSON)
-- Returns 'OK' | 'LOST' (no such worker)
local workers, messages = unpack(KEYS)
local incarnation, message = unpack(ARGV)
if not redis.call('ZSCORE', workers, incarnation) then return 'LOST' end
redis.call('XADD', messages, 'MAXLEN', '~', 256, '*', 'm', message)
redis.call('PEXPIRE', messages, 600000)
return 'OK'
