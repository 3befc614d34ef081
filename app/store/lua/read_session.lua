-- Read a session and any number of its strings at one instant.
--
-- KEYS  1 metadata, 2 progress, from 3 strings of the session
-- ARGV  1 'values' to read the strings, 'presence' to see only which of them are there
--
-- Returns {'ok', metadata, progress, parts, strings}: metadata as a list of fields and values, progress
--         as the same with a line for each, and how many parts that was made of; of the strings their
--         values, or the places of those that are there, the first being 1,
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
  -- Nearly always there is none, which one look at all of them tells.
  if redis.call('EXISTS', unpack(KEYS, 3)) > 0 then
    for i = 3, #KEYS do
      if redis.call('EXISTS', KEYS[i]) == 1 then
        strings[#strings + 1] = i - 2
      end
    end
  end
elseif #KEYS > 2 then
  strings = redis.call('MGET', unpack(KEYS, 3))
end
-- In one piece: a reply takes as long to write as all the rest, if it is one of a hundred parts.
return {'ok', metadata, table.concat(progress, '\n'), #progress, strings}
