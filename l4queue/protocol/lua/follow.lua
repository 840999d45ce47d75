-- Makes a client a follower of live requests: what is written to them from now on is told in its news stream, too.
-- Answers where each of them is, so that nothing before that is missed. Safe to repeat.
-- A request has 16 followers at most. A further one takes the place of those that have gone, else of the first.
-- KEYS  1 news:<client> (stream)
-- ARGV  1 client id  2 life of the news stream after the last call (ms)
--       3 how many of the ids are followed; those after them are only looked at  4... ids
-- Returns {'1' when the news stream was made by this call, else '0', state, offset, state, offset, ...}; the state of an
--         unknown request is ''
local client, ttl, most = ARGV[1], ARGV[2], tonumber(ARGV[3])
local out = {'0'}
if most > 0 and redis.call('PEXPIRE', KEYS[1], ttl) == 0 then
  redis.call('XADD', KEYS[1], '*', 'v', '1')
  redis.call('PEXPIRE', KEYS[1], ttl)
  out[1] = '1'
end
local function add(rk, followers)
  local kept = {}
  for other in string.gmatch(followers, '%S+') do
    if other == client then return end
    kept[#kept + 1] = other
  end
  if #kept >= 16 then
    local alive = {}
    for _, other in ipairs(kept) do
      if redis.call('EXISTS', P .. 'news:' .. other) == 1 then alive[#alive + 1] = other end
    end
    if #alive >= 16 then table.remove(alive, 1) end
    kept = alive
  end
  kept[#kept + 1] = client
  redis.call('HSET', rk, 'followers', table.concat(kept, ' '))
end
for i = 4, #ARGV do
  local rk = P .. 'req:' .. ARGV[i]
  local v = redis.call('HMGET', rk, 'state', 'offset', 'followers')
  local state = v[1] or ''
  if i - 3 <= most and (state == 'submitted' or state == 'queued' or state == 'running') then add(rk, v[3] or '') end
  out[#out + 1] = state
  out[#out + 1] = v[2] or '0'
end
return out
