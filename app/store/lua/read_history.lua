-- Read the last questions of a session with their answers.
--
-- KEYS  1 metadata, 2 progress, 3 the history
-- ARGV  none of its own
--
-- Returns {'ok', questions with their answers as JSON, oldest first}, {'not_found'},
--         {'damaged', key} when half of the session is gone
--
-- Safe to send twice: it reads.

if redis.call('EXISTS', KEYS[2]) == 0 then
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return {'not_found'}
  end
  return {'damaged', KEYS[2]}
end
return {'ok', redis.call('LRANGE', KEYS[3], 0, -1)}
