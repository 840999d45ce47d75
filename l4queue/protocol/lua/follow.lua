-- Makes a client a follower of live requests: what is written to them from now on is told in its news stream, too.
-- Answers where each of them is, so that nothing before that is missed. Safe to repeat.
-- A request has 16 followers at most. A further one takes the place of those that have gone, else of the first.
-- KEYS  1 news:<client> (stream)
-- ARGV  1 client id  2 life of the news stream after the last call (ms)
--       3 how many of the ids are followed; those after them are only looked at  4... ids
-- Returns {'1' when the news stream was made by this call, else '0', state, offset, state, offset, ...}; the state of an
--         unknown request is ''
local news = KEYS[1]
local client, ttl, num_followed = ARGV[1], ARGV[2], tonumber(ARGV[3])
local FIRST = 4  -- where the ids begin

-- Adds the client to the followers of one request.
local function add(record, followers)
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
  redis.call('HSET', record, 'followers', table.concat(kept, ' '))
end

local reply = {'0'}
if num_followed > 0 and redis.call('PEXPIRE', news, ttl) == 0 then
  redis.call('XADD', news, '*', 'v', '1')
  redis.call('PEXPIRE', news, ttl)
  reply[1] = '1'
end
for i = FIRST, #ARGV do
  local record = P .. 'req:' .. ARGV[i]
  local request = fields(record, {'state', 'offset', 'followers'})
  if i < FIRST + num_followed and is_live(request.state) then add(record, request.followers or '') end
  reply[#reply + 1] = request.state or ''
  reply[#reply + 1] = request.offset or '0'
end
return reply
