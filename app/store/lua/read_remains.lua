-- include parts.lua
-- Read whatever there is of a session, whole or not.
--
-- KEYS  1 metadata, 2 progress, 3 events
-- ARGV  1 number of steps to look for at least
--
-- Returns {'ok', {name of the key without the session's prefix, its type, its value}, ...}: of a
--         string the value, of a hash fields and values, of a list and a stream entries; a body of which parts
--         are gone has the type 'partial', and what is nothing that a session has, no value
--
-- Safe to send twice: it reads.

local prefix = string.sub(KEYS[2], 1, -#'progress' - 1)
local names = {'metadata', 'progress', 'events', 'ops', 'export', 'history', 'tokens',
  'result', 'upload'}
local saved = redis.pcall('HGET', KEYS[2], 'saved')
local steps = math.max(type(saved) == 'string' and #saved or 0, tonumber(ARGV[1]))
for step = 1, math.min(steps, 999) do
  names[#names + 1] = 'step:' .. step
  names[#names + 1] = 'draft:' .. step
end
local reply = {'ok'}
for _, name in ipairs(names) do
  local key = name == 'tokens' and tokens_of(prefix) or prefix .. name
  local kind = redis.call('TYPE', key).ok
  local value = ''
  if kind == 'string' then
    value = redis.call('GET', key)
  elseif kind == 'hash' then
    value = redis.call('HGETALL', key)
    if name == 'result' or name == 'upload' then
      local bytes = 0
      for _, part in ipairs(parts_of(key)) do
        local length = redis.pcall('STRLEN', part)
        bytes = bytes + (type(length) == 'number' and length or 0)
      end
      kind = bytes == tonumber(redis.call('HGET', key, 'size') or nil) and kind or 'partial'
    end
  elseif kind == 'list' then
    value = redis.call('LRANGE', key, 0, -1)
  elseif kind == 'stream' then
    value = redis.call('XRANGE', key, '-', '+')
  end
  if kind ~= 'none' then
    reply[#reply + 1] = {name, kind, value}
  end
end
return reply
