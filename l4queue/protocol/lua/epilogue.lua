-- Runs the calls of one EVALSHA (appended when scripts are loaded): each is `run(KEYS, ARGV)`.
-- The last argument is '' for one call. For several of this script it has the numbers of keys and arguments of each,
-- such as '2,7 2,8'. The reply is a list then, and a call that fails has its error in it: the others run.
local layout, replies = table.remove(ARGV), {}
local at_key, at_arg = 0, 0

-- The next items of a list, as a list of their own.
local function part(list, from, num)
  local items = {}
  for i = 1, num do items[i] = list[from + i] end
  return items
end

if layout == '' then
  local is_done, reply = pcall(run, KEYS, ARGV)
  finish()
  if not is_done then error(reply, 0) end
  return reply
end
for num_keys, num_args in string.gmatch(layout, '(%d+),(%d+)') do
  local is_done, reply = pcall(run, part(KEYS, at_key, num_keys), part(ARGV, at_arg, num_args))
  if not is_done then reply = {err = type(reply) == 'table' and reply.err or tostring(reply)} end
  replies[#replies + 1] = reply
  at_key, at_arg = at_key + num_keys, at_arg + num_args
end
finish()
return replies
