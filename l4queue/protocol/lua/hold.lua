-- Notes which blocks of prompts a worker's prefix cache holds (l4queue/policy/prefix_blocks.py), for dispatchers.
-- KEYS  1 workers (zset)  2 blocks:<incarnation> (set)
-- ARGV  1 incarnation  2 packed keys that are new  3 packed keys that are gone  4 bytes of a key
--       5 '1': the new ones are all  6 how long to keep them without news (ms)
-- Returns 'OK' | 'UNKNOWN' (the set has gone: tell all) | 'LOST' (the lease was reaped)
local workers, blocks = unpack(KEYS)
local size, is_all, ttl_ms = tonumber(ARGV[4]), ARGV[5] == '1', ARGV[6]
local MOST = 1000  -- of one command: its arguments lie on Lua's stack

-- Runs a command on the set for all of these keys.
local function each(command, packed)
  for from = 1, #packed, MOST * size do
    local members = {}
    for i = from, math.min(from + MOST * size - 1, #packed), size do
      members[#members + 1] = string.sub(packed, i, i + size - 1)
    end
    redis.call(command, blocks, unpack(members))
  end
end

if not redis.call('ZSCORE', workers, ARGV[1]) then return 'LOST' end
if is_all then
  redis.call('DEL', blocks)
elseif redis.call('EXISTS', blocks) == 0 then
  return 'UNKNOWN'
end
each('SREM', ARGV[3])
each('SADD', ARGV[2])
redis.call('PEXPIRE', blocks, ttl_ms)
return 'OK'
