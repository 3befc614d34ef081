-- Read whatever there is of a session, whole or not.
--
-- KEYS  1 metadata, 2 progress
-- ARGV  1 number of steps to look for at least
--
-- Returns {'ok', {name of the key without the session's prefix, its type, its value}, ...}; the value
--         of a string, the fields and values of a hash, '' of anything else
--
-- Safe to send twice: it reads.

local prefix = string.sub(KEYS[2], 1, -#'progress' - 1)
local names = {'metadata', 'progress', 'events', 'ops', 'export', 'result', 'upload'}
local saved = redis.pcall('HGET', KEYS[2], 'saved')
for step = 1, math.max(type(saved) == 'string' and #saved or 0, tonumber(ARGV[1])) do
  names[#names + 1] = 'step:' .. step
  names[#names + 1] = 'draft:' .. step
end
local reply = {'ok'}
for _, name in ipairs(names) do
  local kind = redis.call('TYPE', prefix .. name).ok
  if kind == 'string' then
    reply[#reply + 1] = {name, kind, redis.call('GET', prefix .. name)}
  elseif kind == 'hash' then
    reply[#reply + 1] = {name, kind, redis.call('HGETALL', prefix .. name)}
  elseif kind ~= 'none' then
    reply[#reply + 1] = {name, kind, ''}
  end
end
return reply
