-- Forget a consumer that will not come back. One that still holds a job is kept, since its jobs
-- would be forgotten with it.
--
-- KEYS  1 the queue
-- ARGV  1 consumer group, 2 consumer
--
-- Returns {'ok'}, {'busy'} when it holds a job
--
-- Safe to send twice: who is gone stays gone.

local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], '-', '+', 1, ARGV[2])
if held.err then
  -- The queue was lost, and its consumers with it.
  return {'ok'}
end
if held[1] then
  return {'busy'}
end
redis.call('XGROUP', 'DELCONSUMER', KEYS[1], ARGV[1], ARGV[2])
return {'ok'}
