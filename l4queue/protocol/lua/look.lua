-- Reads the head of a queue: requests that wait, in serving order, without background ones.
-- KEYS  1 q:<stage> (zset)
-- ARGV  1 most requests
-- Returns rows of {id, tokens of prompt and output so far, ms in the queue, `held` of the record}
local queue, most = KEYS[1], tonumber(ARGV[1])
local now, rows = now_ms(), {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', queue, '-inf', '(' .. int(BACKGROUND), 'LIMIT', 0, most)) do
  local request = fields(P .. 'req:' .. id, {'prompt_tokens', 'offset', 'queued_ms', 'moved_ms', 'held'})
  local tokens = (whole(request.prompt_tokens) or 0) + (whole(request.offset) or 0)
  local since_ms = whole(request.moved_ms) or whole(request.queued_ms) or now
  rows[#rows + 1] = {id, int(tokens), int(math.max(0, now - since_ms)), request.held or ''}
end
return rows
