-- Moves waiting requests of one queue to the stages that their lengths belong to now. queued -> queued
-- For a stage that the plan no longer has, a range that has changed, the own queue of a worker that is gone.
-- KEYS  1 q:<from> (zset)
-- ARGV  1 from  2 number left out at the head  3 most requests looked at
--       4.. upper ends of the stages but the last (tokens, ascending)
-- Returns {moved, looked at}
local queue = KEYS[1]
local from, num_left_out, most = ARGV[1], ARGV[2], ARGV[3]
local ends = {}
for i = 4, #ARGV do ends[i - 3] = tonumber(ARGV[i]) end

-- The stage of a request of this length: the number of ends that it has reached.
local function stage_of(tokens)
  local stage = 0
  while ends[stage + 1] and tokens >= ends[stage + 1] do stage = stage + 1 end
  return int(stage)
end

local num_moved, ids = 0, redis.call('ZRANGEBYSCORE', queue, '-inf', '+inf', 'LIMIT', num_left_out, most)
for _, id in ipairs(ids) do
  local record = P .. 'req:' .. id
  local request = fields(record, {'state', 'stage', 'prompt_tokens', 'offset', 'score'})
  local is_here = request.state == 'queued' and request.stage == from
  local what = is_here and fault(id, checked(id))
  if what then
    condemn(id, what)
  elseif is_here then
    local tokens = tonumber(request.prompt_tokens) + tonumber(request.offset)
    local to = stage_of(tokens)
    if to ~= from then
      dequeue(id, from, tokens)
      redis.call('HSET', record, 'stage', to)
      note(record, {what = 'rerouted', from = from, to = to})
      enqueue(id, to, request.score, tokens)
      num_moved = num_moved + 1
    end
  else
    dequeue(id, from, 0)
  end
end
return {num_moved, #ids}
