-- include session.lua
-- Set the language that a session is answered in; no event when it is that already.
--
-- KEYS  none of its own
-- ARGV  6 the language
--
-- Returns {'ok'}, {'not_found'}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end

if redis.call('HGET', METADATA, 'language') ~= ARGV[6] then
  moved = moved or redis.call('EXISTS', METADATA) == 0
  redis.call('HSET', METADATA, 'language', ARGV[6])
  change()
  record('language_changed', 'language', ARGV[6])
end
return answer({'ok'})
