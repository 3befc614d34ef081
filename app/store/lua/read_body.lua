-- include parts.lua
-- Read what is known of a body, and its first part, at one instant.
--
-- KEYS  1 metadata, 2 progress, 3 the body
-- ARGV  none
--
-- Returns {'ok', {field, value, ...}, first part or ''}, {'not_found'}, {'body_not_found'},
--         {'damaged', key} when its first part is gone
--
-- Safe to send twice: it reads.

if redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then
  return {'not_found'}
end
local body = redis.call('HGETALL', KEYS[3])
if #body == 0 then
  return {'body_not_found'}
end
local parts = parts_of(KEYS[3])
local first = parts[1] and redis.call('GET', parts[1])
if parts[1] and not first then
  return {'damaged', KEYS[3]}
end
return {'ok', body, first or ''}
