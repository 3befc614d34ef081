-- Take a job out of the queue for good.
--
-- KEYS  1 the queue
-- ARGV  1 consumer group, 2 consumer, 3 id of the job
--
-- Returns {'ok'}, {'lost'} when somebody else has taken the job over, or it is done
--
-- Safe to send twice: what is gone stays gone.

local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
-- An error is that of a queue that was lost with its group.
if held.err or not held[1] or held[1][2] ~= ARGV[2] then
  return {'lost'}
end
redis.call('XACK', KEYS[1], ARGV[1], ARGV[3])
redis.call('XDEL', KEYS[1], ARGV[3])
return {'ok'}
