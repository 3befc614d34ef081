-- Read the draft of a step beside the version of the saved step.
--
-- KEYS  1 progress, 2 the draft, 3 metadata
-- ARGV  1 number of the step
--
-- Returns {'ok', draft, version or ''}, {'not_found'}, {'damaged', key},
--         {'out_of_range', number of steps}, {'draft_not_found'}
--
-- Safe to send twice: it reads.

local found = redis.call('HMGET', KEYS[1], 'saved', 'v' .. ARGV[1])
if not found[1] then
  if redis.call('EXISTS', KEYS[1], KEYS[3]) > 0 then
    return {'damaged', KEYS[1]}
  end
  return {'not_found'}
end
local number = tonumber(ARGV[1])
if number > #found[1] then
  return {'out_of_range', string.format('%d', #found[1])}
end
local draft = redis.call('GET', KEYS[2])
if not draft then
  return {'draft_not_found'}
end
return {'ok', draft, string.sub(found[1], number, number) == '1' and found[2] or ''}
