-- include sending.lua
-- include tasks.lua
-- Set the status of a task and begin its life anew, on those of its lists too that lie beside it.
--
-- KEYS  1 the task, then its lists, two keys each
-- ARGV  1 the sending (sending.lua), 2 attempt (1 = first), 3 id of the operation that made the task,
--       4 life in ms, 5 entry, 6 how many of the lists, from the first, expire with their tasks,
--       7 status, 8 the statuses that it may follow, each between bars, 9 updated_at in Unix ms
--
-- Returns {'ok'}, {'not_found'} when the task is gone, another one with its id aside,
--         {'invalid_transition', status}, {'damaged', key}
--
-- Safe to send twice: a status may follow itself. A repeat (attempt 2 and later) that finds the task
-- gone takes it that an earlier sending did the work, before somebody removed it.

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
if not string.find(ARGV[8], '|' .. found[2] .. '|', 1, true) then
  return {'invalid_transition', found[2]}
end
check_lists(2)
redis.call('HSET', KEYS[1], 'status', ARGV[7], 'updated_at', ARGV[9])
redis.call('PEXPIREAT', KEYS[1], whole(now_ms + tonumber(ARGV[4])))
enlist(2, tonumber(ARGV[6]), ARGV[5], tonumber(ARGV[4]))
return {'ok'}
