-- include session.lua
-- Put a body whose parts are all there in the place of the one before it.
--
-- KEYS  5 the body, from 6 its parts
-- ARGV  6 type of the event, 7 name of the run that made it ('' = it has none), 8 number of values
--       about the body, then field and value of each, then field and value of what the event says
--
-- Returns {'ok', {field, value, ...}} with what is known of the body, {'not_found'},
--         {'part_lost'} when the body is not whole any more,
--         {'superseded'} when another run has followed the one that made it
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
local last_part = idempotency and #KEYS - 1 or #KEYS
for i = 6, last_part do
  if redis.call('EXISTS', KEYS[i]) == 0 then
    return {'part_lost'}
  end
end

if ARGV[7] ~= '' and redis.call('HGET', PROGRESS, 'run') ~= ARGV[7] then
  return {'superseded'}
end

local before = parts_of(KEYS[5])
local kind = redis.call('TYPE', KEYS[5]).ok
if kind ~= 'hash' and kind ~= 'none' then
  -- Whatever stands there is no body.
  redis.call('DEL', KEYS[5])
end
local last = 8 + tonumber(ARGV[8])
redis.call('HSET', KEYS[5], unpack(ARGV, 9, last))
redis.call('PEXPIREAT', KEYS[5], deadline)
for i = 6, last_part do
  redis.call('PEXPIREAT', KEYS[i], deadline)
  redis.call('HSET', OPS, 'part:' .. KEYS[i], 'kept')
end
for _, part in ipairs(before) do
  redis.call('DEL', part)
  redis.call('HDEL', OPS, 'part:' .. part)
end
change()
record(ARGV[6], unpack(ARGV, last + 1))
return answer({'ok', redis.call('HGETALL', KEYS[5])})
