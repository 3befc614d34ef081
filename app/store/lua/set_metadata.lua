-- include session.lua
-- Change who a session belongs to and what is attached to it.
--
-- KEYS  none of its own
-- ARGV  6 number of fields to set, then field and value of each, then the fields to remove
--
-- Returns {'ok'}, {'not_found'}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end

moved = moved or redis.call('EXISTS', METADATA) == 0
local last = 6 + 2 * tonumber(ARGV[6])
if last > 6 then
  redis.call('HSET', METADATA, unpack(ARGV, 7, last))
end
if #ARGV > last then
  redis.call('HDEL', METADATA, unpack(ARGV, last + 1))
end
change()
record('metadata_changed')
return answer({'ok'})
