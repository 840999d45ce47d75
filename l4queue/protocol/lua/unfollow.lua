-- Tells a client no more of what is written to a request: nobody there waits for it. Safe to repeat.
-- KEYS  1 req:<id>
-- ARGV  1 client id
-- Returns 'OK' | 'DUP' (it did not follow)
local kept, is_follower = {}, false
for client in string.gmatch(redis.call('HGET', KEYS[1], 'followers') or '', '%S+') do
  if client == ARGV[1] then is_follower = true else kept[#kept + 1] = client end
end
if not is_follower then return 'DUP' end
redis.call('HDEL', KEYS[1], 'followers')
if #kept > 0 then redis.call('HSET', KEYS[1], 'followers', table.concat(kept, ' ')) end
return 'OK'
