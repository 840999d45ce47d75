-- Takes back the blame for the loss of a worker incarnation that has not died after all: its lease ran out because
-- it was stopped, or cut off. A request that waits to be run alone only for that returns to its stage.
-- queued -> queued, running -> running
-- KEYS  1 lost:<incarnation> (hash: id -> '1' where the crash counts as one alone)
-- ARGV  1 worker id  2.. ids whose blame stands
-- Returns 'OK'
local stands = {}
for i = 2, #ARGV do stands[ARGV[i]] = true end
local blamed = redis.call('HGETALL', KEYS[1])
redis.call('DEL', KEYS[1])
for i = 1, #blamed, 2 do
  local id = blamed[i]
  local rk = P .. 'req:' .. id
  local v = redis.call('HMGET', rk, 'state', 'stage', 'crashes', 'score', 'prompt_tokens', 'offset', 'home')
  local is_live = v[1] == 'queued' or v[1] == 'running'
  local what = is_live and fault(id)
  if what then
    condemn(id, what)
  elseif is_live and not stands[id] and tonumber(v[3]) > 0 then
    local to, tokens = v[2], tonumber(v[5]) + tonumber(v[6])
    if v[1] == 'queued' and v[2] == 'solo' and tonumber(v[3]) <= 2 then
      to = v[7] or '0'
      dequeue(id, 'solo', tokens)
    end
    local crashes = redis.call('HINCRBY', rk, 'crashes', -1)
    if blamed[i + 1] == '1' then redis.call('HINCRBY', rk, 'solo_crashes', -1) end
    redis.call('HINCRBY', P .. 'counts', 'pardoned', 1)
    -- 'rerouted' with a fact more, since readers of an older release know no other word for it
    note(rk, {what = 'rerouted', from = v[2], to = to, pardoned = ARGV[1], crashes = crashes})
    if to ~= v[2] then
      redis.call('HSET', rk, 'stage', to)
      enqueue(id, to, v[4], tokens)
    end
  end
end
return 'OK'
