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

-- The reply of a call, or its error with the server's code first, which servers wrap in different ways.
local function reply_of(keys, args)
  local is_done, reply = pcall(run, keys, args)
  if is_done then return reply end
  local text = type(reply) == 'table' and reply.err or tostring(reply)
  return {err = string.match(text, '^%-?(%u[%u%d]+ .+)') or string.match(text, ' %-(%u[%u%d]+ .+)') or 'ERR ' .. text}
end

if layout == '' then
  local reply = reply_of(KEYS, ARGV)
  finish()
  return reply
end
for num_keys, num_args in string.gmatch(layout, '(%d+),(%d+)') do
  replies[#replies + 1] = reply_of(part(KEYS, at_key, num_keys), part(ARGV, at_arg, num_args))
  at_key, at_arg = at_key + num_keys, at_arg + num_args
end
finish()
return replies
