-- Say that a job is still being worked on, so that nobody else takes it over.
--
-- KEYS  1 the queue
-- ARGV  1 consumer group, 2 consumer, 3 id of the job
--
-- Returns {'ok'}, {'lost'} when somebody else has taken the job over, or it is done
--
-- Safe to send twice: it begins the same wait anew.

local held = redis.pcall('XPENDING', KEYS[1], ARGV[1], ARGV[3], ARGV[3], 1)
-- An error is that of a queue that was lost with its group.
if held.err or not held[1] or held[1][2] ~= ARGV[2] then
  return {'lost'}
end
redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[3], 'JUSTID')
return {'ok'}
