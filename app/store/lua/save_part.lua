-- include sending.lua
-- Keep a part of a body that is on its way, under its session's deadline.
--
-- KEYS  1 progress, 2 ops, 3 the part
-- ARGV  1 the sending (sending.lua), 2 the bytes, 3 how long the body may be on its way in ms
--
-- Returns {'ok'}, {'not_found'}
--
-- Safe to send twice: it writes the same bytes to the same key. The part is noted in `ops`, so that
-- deleting the session takes it along, and a later write removes it when the body is never finished.

local deadline = redis.call('HGET', KEYS[1], 'deadline')
if not deadline then
  return {'not_found'}
end
if redis.call('HGET', KEYS[2], 'part:' .. KEYS[3]) == 'kept' then
  -- A sending that was given up arrives after the body was placed.
  return {'ok'}
end
redis.call('SET', KEYS[3], ARGV[2], 'PXAT', deadline)
redis.call('HSET', KEYS[2], 'part:' .. KEYS[3], whole(now_ms + tonumber(ARGV[3])))
redis.call('PEXPIREAT', KEYS[2], deadline)
return {'ok'}
