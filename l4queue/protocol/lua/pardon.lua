-- Takes back the blame for the loss of a worker incarnation that has not died after all: its lease ran out because
-- it was stopped, or cut off. A request that waits to be run alone only for that returns to its stage.
-- queued -> queued, running -> running
-- KEYS  1 lost:<incarnation> (hash: id -> '1' where the crash counts as one alone)
-- ARGV  1 worker id  2.. ids whose blame stands
-- Returns 'OK'
local lost, worker_id = KEYS[1], ARGV[1]
local stands = {}
for i = 2, #ARGV do stands[ARGV[i]] = true end
local blamed = redis.call('HGETALL', lost)
redis.call('DEL', lost)
for i = 1, #blamed, 2 do
  local id, was_alone = blamed[i], blamed[i + 1] == '1'
  local record = P .. 'req:' .. id
  local request = fields(record, {'state', 'stage', 'crashes', 'score', 'prompt_tokens', 'offset', 'home'})
  local is_leased_or_waiting = request.state == 'queued' or request.state == 'running'
  local what = is_leased_or_waiting and fault(id, checked(id))
  if what then
    condemn(id, what)
  elseif is_leased_or_waiting and not stands[id] and tonumber(request.crashes) > 0 then
    local to, tokens = request.stage, tonumber(request.prompt_tokens) + tonumber(request.offset)
    if request.state == 'queued' and request.stage == 'solo' and tonumber(request.crashes) <= 2 then
      to = request.home or '0'
      dequeue(id, 'solo', tokens)
    end
    local crashes = redis.call('HINCRBY', record, 'crashes', -1)
    if was_alone then redis.call('HINCRBY', record, 'solo_crashes', -1) end
    count('pardoned', 1)
    -- 'rerouted' with a fact more, since readers of an older release know no other word for it
    note(record, {what = 'rerouted', from = request.stage, to = to, pardoned = worker_id, crashes = crashes})
    if to ~= request.stage then
      redis.call('HSET', record, 'stage', to)
      enqueue(id, to, request.score, tokens)
    end
  end
end
return 'OK'
