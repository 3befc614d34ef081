-- include clock.lua
-- Read what is kept of the tokens of a session.
--
-- KEYS  1 metadata, 2 progress, 3 the tokens
-- ARGV  none of its own
--
-- Returns {'ok', the store's time in Unix ms, field and value of each}, {'not_found'},
--         {'damaged', key} when half of the session is gone
--
-- Safe to send twice: it reads.

if redis.call('EXISTS', KEYS[2]) == 0 then
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return {'not_found'}
  end
  return {'damaged', KEYS[2]}
end
return {'ok', whole(store_time_ms()), redis.call('HGETALL', KEYS[3])}
