-- include status.lua
-- Change several fields of a session at once, all or none: its status, its language, who it belongs
-- to, what is attached to it. No event for a status or a language that it has already.
--
-- KEYS  none of its own
-- ARGV  6 count of changes that the session must have ('' = any), 7 the status ('' = leave it),
--       8 those that it may follow as '|pending|error|', 9 the message of an error ('' = none),
--       10 number of values to set in the metadata, then field and value of each, then the fields
--       to remove
--
-- Returns {'ok', metadata, progress, '1' when the status is another one now} with the hashes as
--         field and value lists, {'not_found'},
--         {'invalid_transition', current status}, {'changed'} when 6 does not hold
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
if ARGV[6] ~= '' and state.changes ~= ARGV[6] then
  return {'changed'}
end
local is_entering = ARGV[7] ~= '' and ARGV[7] ~= state.status
if is_entering and not may_enter(ARGV[8]) then
  return {'invalid_transition', state.status}
end

local last = 10 + tonumber(ARGV[10])
local language, others = nil, #ARGV > last
for i = 11, last, 2 do
  if ARGV[i] == 'language' then
    language = redis.call('HGET', METADATA, 'language') ~= ARGV[i + 1] and ARGV[i + 1]
  else
    others = true
  end
end
if language or others then
  moved = moved or redis.call('EXISTS', METADATA) == 0
  if last > 10 then
    redis.call('HSET', METADATA, unpack(ARGV, 11, last))
  end
  if #ARGV > last then
    redis.call('HDEL', METADATA, unpack(ARGV, last + 1))
  end
  change()
  if language then
    record('language_changed', 'language', language)
  end
  if others then
    record('metadata_changed')
    place_anew()
  end
end
if is_entering then
  enter(ARGV[7], ARGV[9], '')
elseif ARGV[9] ~= '' then
  change('error_message', ARGV[9])
end
if moved then
  redis.call('HSET', PROGRESS, 'deadline', deadline)
end
return answer({'ok', redis.call('HGETALL', METADATA), redis.call('HGETALL', PROGRESS),
  is_entering and '1' or ''})
