-- include sending.lua
-- Add a job for the revision of a session that is about to be finalized in another slot.
--
-- KEYS  1 the queue
-- ARGV  1 the sending (sending.lua), 2 session, 3 revision, 4 for how long a job that is there stands
--       for this one too, in ms, 5 how old a job may get, in ms
--
-- Returns {'ok'}, {'known'} when the queue has had such a job for no longer than that
--
-- Safe to send twice: a repeat finds the job. Nobody drops one that is so young.

local young = redis.call('XREVRANGE', KEYS[1], '+', whole(now_ms - tonumber(ARGV[4])), 'COUNT', 1000)
for _, job in ipairs(young) do
  local told = {}
  for i = 1, #job[2], 2 do
    told[job[2][i]] = job[2][i + 1]
  end
  if told.session_id == ARGV[2] and told.revision == ARGV[3] then
    return {'known'}
  end
end
-- What is older than a session lives waits for nobody any more.
redis.call('XADD', KEYS[1], 'MINID', '~', whole(math.max(0, now_ms - tonumber(ARGV[5]))), '*',
  'session_id', ARGV[2], 'revision', ARGV[3])
return {'ok'}
