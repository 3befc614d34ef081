-- include sending.lua
-- include tasks.lua
-- Remove a task, and take it off those of its lists that lie beside it.
--
-- KEYS  1 the task, then its lists, two keys each
-- ARGV  1 the sending (sending.lua), 2 attempt (1 = first), 3 id of the operation that made the task,
--       4 entry, 5 the statuses that it may have, each between bars ('' = any)
--
-- Returns {'ok'}, {'not_found'} when the task is gone, another one with its id aside,
--         {'invalid_transition', status}, {'damaged', key}
--
-- Safe to send twice: a repeat (attempt 2 and later) that finds the task gone takes it that an
-- earlier sending did the work.

local found = redis.call('HMGET', KEYS[1], 'operation', 'status')
if found[1] ~= ARGV[3] then
  if tonumber(ARGV[2]) > 1 then
    return {'ok'}
  end
  return {'not_found'}
end
if not found[2] then
  return {'damaged', KEYS[1]}
end
if ARGV[5] ~= '' and not string.find(ARGV[5], '|' .. found[2] .. '|', 1, true) then
  return {'invalid_transition', found[2]}
end
redis.call('DEL', KEYS[1])
delist(2, ARGV[4])
return {'ok'}
