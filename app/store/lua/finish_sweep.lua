-- include room.lua
-- Give the lease of a sweep back, and note what came of it.
--
-- KEYS  1 entries
-- ARGV  1 who has it, 2 how many removals failed, 3 how many tasks were removed
--
-- Returns {'ok'}, {'lost'} when somebody else has it, or nobody
--
-- Safe to send twice: a repeat finds the lease given back.

local lease = INDEX .. 'lease'
if redis.call('GET', lease) ~= ARGV[1] then
  return {'lost'}
end
redis.call('DEL', lease)
local cleanup = INDEX .. 'cleanup'
redis.call('HSET', cleanup, 'last_run', whole(store_time_ms()))
redis.call('HINCRBY', cleanup, 'failures', ARGV[2])
redis.call('HINCRBY', cleanup, 'tasks_removed', ARGV[3])
return {'ok'}
