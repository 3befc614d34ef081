-- include sending.lua
-- include tasks.lua
-- Keep a task that is not there yet, and put it on those of its lists that lie beside it.
--
-- KEYS  1 the task, then its lists, two keys each
-- ARGV  1 the sending (sending.lua), 2 operation id, 3 life in ms, 4 entry, 5 how many of the lists,
--       from the first, expire with their tasks, then field and value of each
--
-- Returns {'ok'}, {'exists'} when there is another task with this id
--
-- Safe to send twice: the task remembers the operation that made it.

local made_by = redis.call('HGET', KEYS[1], 'operation')
if made_by == ARGV[2] then
  return {'ok'}
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {'exists'}
end
check_lists(2)
redis.call('HSET', KEYS[1], 'operation', ARGV[2], unpack(ARGV, 6))
redis.call('PEXPIREAT', KEYS[1], whole(now_ms + tonumber(ARGV[3])))
enlist(2, tonumber(ARGV[5]), ARGV[4], tonumber(ARGV[3]))
return {'ok'}
