-- include clock.lua
-- Add a job for the revision of a session that is about to be finalized in another slot.
--
-- KEYS  1 the queue
-- ARGV  1 session, 2 revision, 3 for how long a job that is there stands for this one too, in ms,
--       4 how old a job may get, in ms
--
-- Returns {'ok'}, {'known'} when the queue has had such a job for no longer than that
--
-- Safe to send twice: a repeat finds the job. Nobody drops one that is so young.

local now_ms = store_time_ms()
local young = redis.call('XREVRANGE', KEYS[1], '+', whole(now_ms - tonumber(ARGV[3])), 'COUNT', 1000)
for _, job in ipairs(young) do
  local told = {}
  for i = 1, #job[2], 2 do
    told[job[2][i]] = job[2][i + 1]
  end
  if told.session_id == ARGV[1] and told.revision == ARGV[2] then
    return {'known'}
  end
end
-- What is older than a session lives waits for nobody any more.
redis.call('XADD', KEYS[1], 'MINID', '~', whole(math.max(0, now_ms - tonumber(ARGV[4]))), '*',
  'session_id', ARGV[1], 'revision', ARGV[2])
return {'ok'}
