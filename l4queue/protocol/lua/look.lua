-- Reads the head of a queue: requests that wait, in serving order, without background ones.
-- KEYS  1 q:<stage> (zset)
-- ARGV  1 most requests  2 ms after its place in the order at which a background request counts as any other
-- Returns rows of {id, tokens of prompt and output so far, ms in the queue, `held` of the record}
local queue, most, overdue_ms = KEYS[1], tonumber(ARGV[1]), tonumber(ARGV[2])
local now, waiting, rows = now_ms(), {}, {}

-- Adds requests of this range of scores, with their places in the order: scores less `shift`.
local function add_waiting(low, high, shift)
  local found = redis.call('ZRANGEBYSCORE', queue, low, high, 'WITHSCORES', 'LIMIT', 0, most)
  for i = 1, #found, 2 do waiting[#waiting + 1] = {found[i], tonumber(found[i + 1]) - shift} end
end

add_waiting('-inf', '(' .. int(BACKGROUND), 0)
add_waiting(int(BACKGROUND), int(BACKGROUND + now - overdue_ms), BACKGROUND)
table.sort(waiting, function(a, b) return a[2] < b[2] or a[2] == b[2] and a[1] < b[1] end)
for i = 1, math.min(most, #waiting) do
  local id = waiting[i][1]
  local request = fields(P .. 'req:' .. id, {'prompt_tokens', 'offset', 'queued_ms', 'moved_ms', 'held'})
  local tokens = (whole(request.prompt_tokens) or 0) + (whole(request.offset) or 0)
  local since_ms = whole(request.moved_ms) or whole(request.queued_ms) or now
  rows[#rows + 1] = {id, int(tokens), int(math.max(0, now - since_ms)), request.held or ''}
end
return rows
