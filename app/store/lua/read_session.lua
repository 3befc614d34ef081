-- Read a session and any number of its strings at one instant.
--
-- KEYS  1 metadata, 2 progress, from 3 strings of the session
-- ARGV  none
--
-- Returns {'ok', metadata, progress, strings} with the hashes as field and value lists,
--         {'not_found'}, {'damaged', key} when one of the hashes is gone and the other is not
--
-- Safe to send twice: it reads.

local metadata = redis.call('HGETALL', KEYS[1])
local progress = redis.call('HGETALL', KEYS[2])
if #metadata == 0 and #progress == 0 then
  return {'not_found'}
end
if #metadata == 0 then
  return {'damaged', KEYS[1]}
end
if #progress == 0 then
  return {'damaged', KEYS[2]}
end
local strings = {}
if #KEYS > 2 then
  strings = redis.call('MGET', unpack(KEYS, 3))
end
return {'ok', metadata, progress, strings}
