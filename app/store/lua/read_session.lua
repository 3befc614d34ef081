-- Read a session and any number of its strings at one instant.
--
-- KEYS  1 metadata, 2 progress, from 3 strings of the session
-- ARGV  1 'values' to read the strings, 'presence' to see only which of them are there
--
-- Returns {'ok', metadata, progress, strings} with the hashes as field and value lists, and of the
--         strings their values, or 1 and 0,
--         {'not_found'}, {'damaged', key} when one of the hashes is none, or gone and the other is
--         not
--
-- Safe to send twice: it reads.

local metadata = redis.pcall('HGETALL', KEYS[1])
local progress = redis.pcall('HGETALL', KEYS[2])
if #metadata == 0 and #progress == 0 and not metadata.err and not progress.err then
  return {'not_found'}
end
-- The key that is at fault, and not all that are read here.
if #metadata == 0 then
  return {'damaged', KEYS[1]}
end
if #progress == 0 then
  return {'damaged', KEYS[2]}
end
local strings = {}
if ARGV[1] == 'presence' then
  for i = 3, #KEYS do
    strings[i - 2] = redis.call('EXISTS', KEYS[i])
  end
elseif #KEYS > 2 then
  strings = redis.call('MGET', unpack(KEYS, 3))
end
return {'ok', metadata, progress, strings}
