-- Registers a worker incarnation or renews its lease, and publishes its load and counters.
-- KEYS  1 workers (zset: incarnation -> expiry ms)  2 w:<incarnation> (hash)  3 hist
-- ARGV  1 incarnation  2 lease (ms)  3 worker id  4 load (JSON)  5 register ('1') or renew ('0')
--       6 sequence number of this heartbeat  7 work before the worker (ms), by which ready ones are woken in order;
--       '' = it takes nothing: what it would have been woken for wakes another  8 brief of the load, for siblings
--       9.. pairs of hist field, increment
-- The term of the lease is noted for reapers: an expiry beyond it is impossible.
-- Returns 'OK' | 'LOST' (the lease ran out and was reaped: take a new incarnation)
local workers, worker, hist = unpack(KEYS)
local incarnation, lease_ms, worker_id, load = ARGV[1], tonumber(ARGV[2]), ARGV[3], ARGV[4]
local is_first, sequence, backlog_ms = ARGV[5] == '1', ARGV[6], ARGV[7]
if not is_first and not redis.call('ZSCORE', workers, incarnation) then return 'LOST' end
local now = now_ms()
local last = fields(worker, {'seq', 'ready'})
local is_fresh = last.seq ~= sequence
redis.call('HDEL', worker, 'graced')
redis.call('ZADD', workers, int(now + lease_ms), incarnation)
redis.call('HSET', worker, 'worker', worker_id, 'load', load, 'brief', ARGV[8], 'seq', sequence,
  'seen_ms', int(now), 'lease_ms', lease_ms)
if is_fresh then
  for i = 9, #ARGV, 2 do redis.call('HINCRBY', hist, ARGV[i], ARGV[i + 1]) end
end
if last.ready and backlog_ms ~= '' then
  redis.call('ZADD', P .. 'ready:' .. last.ready, 'XX', backlog_ms, incarnation)
elseif last.ready then
  stop_waiting(incarnation, last.ready)
  redis.call('HDEL', worker, 'ready')
end
return 'OK'
