-- include tasks.lua
-- Keep a task that is not there yet, and put it on those of its lists that lie beside it.
--
-- KEYS  1 the task, then its lists, two keys each
-- ARGV  1 operation id, 2 life in ms, 3 entry, 4 how many of the lists, from the first, expire with
--       their tasks, then field and value of each
--
-- Returns {'ok'}, {'exists'} when there is another task with this id
--
-- Safe to send twice: the task remembers the operation that made it.

local made_by = redis.call('HGET', KEYS[1], 'operation')
if made_by == ARGV[1] then
  return {'ok'}
end
if redis.call('EXISTS', KEYS[1]) == 1 then
  return {'exists'}
end
check_lists(2)
redis.call('HSET', KEYS[1], 'operation', ARGV[1], unpack(ARGV, 5))
redis.call('PEXPIREAT', KEYS[1], whole(now_ms + tonumber(ARGV[2])))
enlist(2, tonumber(ARGV[4]), ARGV[3], tonumber(ARGV[2]))
return {'ok'}
