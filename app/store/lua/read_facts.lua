-- Read what places a session in the index, where that does not lie beside it.
--
-- KEYS  1 metadata, 2 progress, 3 events
-- ARGV  1 id of the last event that the feed has ('-' = none)
--
-- Returns {'ok', created in Unix ms, class, end of the generation in Unix ms or '', marks of the steps
--          that were ever saved, count of changes, workspace or '', user or '', last activity in Unix
--          ms, deadline in Unix ms, catalogue pin, {when each step was saved in Unix ms or ''},
--          {{event id, {field, value, ...}}, ...}}, {'not_found'}, {'damaged', key}
--
-- Safe to send twice: it reads.

local found = redis.call('HMGET', KEYS[2], 'created_at', 'status', 'saved', 'held', 'ended_at', 'ever',
  'changes', 'updated_at', 'active_at', 'deadline', 'catalogue')
local created_at, status, saved, held, ended_at, ever = unpack(found, 1, 6)
local changes, updated_at, active_at, deadline, catalogue = unpack(found, 7, 11)
if not status and redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then
  return {'not_found'}
end
local activity = math.max(tonumber(updated_at or 0) or 0, tonumber(active_at or 0) or 0)
if not (status and saved and changes and catalogue and tonumber(created_at or nil)
  and tonumber(deadline or nil) and activity > 0) then
  return {'damaged', KEYS[2]}
end

local times = {}
for step = 1, #saved do
  times[step] = 's' .. step
end
times = redis.call('HMGET', KEYS[2], unpack(times))
for step = 1, #saved do
  times[step] = times[step] or ''
end
local is_held = held ~= '0' and string.find(saved, '1', 1, true)
local owner = redis.pcall('HMGET', KEYS[1], 'workspace_id', 'user_id')
local events = redis.pcall('XRANGE', KEYS[3], ARGV[1] == '-' and '-' or '(' .. ARGV[1], '+')
return {'ok', created_at, status .. (is_held and ':held' or ':free'), ended_at or '', ever or '',
  changes, owner[1] or '', owner[2] or '', string.format('%.0f', activity), deadline, catalogue,
  times, events.err and {} or events}
