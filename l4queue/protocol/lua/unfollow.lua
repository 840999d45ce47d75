-- Tells a client no more of what is written to a request: nobody there waits for it. Safe to repeat.
-- KEYS  1 req:<id>
-- ARGV  1 client id
-- Returns 'OK' | 'DUP' (it did not follow)
local record, client = KEYS[1], ARGV[1]
local kept, is_follower = {}, false
for other in string.gmatch(redis.call('HGET', record, 'followers') or '', '%S+') do
  if other == client then is_follower = true else kept[#kept + 1] = other end
end
if not is_follower then return 'DUP' end
redis.call('HDEL', record, 'followers')
if #kept > 0 then redis.call('HSET', record, 'followers', table.concat(kept, ' ')) end
return 'OK'
