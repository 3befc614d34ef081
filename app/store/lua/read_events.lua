-- Read a part of a session's log, and how the session is at the same instant.
--
-- KEYS  1 metadata, 2 progress, 3 events
-- ARGV  1 id to go on after ('' = none, read no events), 2 most events to read (0 = all),
--       3 number of fields of the progress to read, then their names, then those of the metadata
--
-- Returns {'ok', fields of the progress, fields of the metadata, first id or '', its type,
--          newest id or '', events as {id, {field, value, ...}}},
--         {'not_found'}, {'damaged', key} when half of the session is gone
--
-- Safe to send twice: it reads.

if redis.call('EXISTS', KEYS[2]) == 0 then
  if redis.call('EXISTS', KEYS[1]) == 0 then
    return {'not_found'}
  end
  return {'damaged', KEYS[2]}
end
local progress, metadata, names = {}, {}, tonumber(ARGV[3])
if names > 0 then
  progress = redis.call('HMGET', KEYS[2], unpack(ARGV, 4, 3 + names))
end
if #ARGV > 3 + names then
  metadata = redis.call('HMGET', KEYS[1], unpack(ARGV, 4 + names))
end

local first = redis.call('XRANGE', KEYS[3], '-', '+', 'COUNT', 1)[1]
if not first then
  return {'ok', progress, metadata, '', '', '', {}}
end
local newest = redis.call('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)[1]
local events = {}
if ARGV[1] ~= '' then
  if tonumber(ARGV[2]) > 0 then
    events = redis.call('XRANGE', KEYS[3], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])
  else
    events = redis.call('XRANGE', KEYS[3], '(' .. ARGV[1], '+')
  end
end
-- The type is the first field that every script writes.
return {'ok', progress, metadata, first[1], first[2][2], newest[1], events}
