-- Read what places a session in the index, where that does not lie beside it.
--
-- KEYS  1 metadata, 2 progress, 3 events
-- ARGV  1 id of the last event that the feed has ('-' = none, '+' = it has them all)
--
-- Returns {'ok', value, ...} with what place_session.lua takes from its third argument on,
--         {'not_found'}, {'damaged', key}
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

local fed, events = ARGV[1] == '+' and '-' or ARGV[1], {}
if ARGV[1] ~= '+' then
  events = redis.pcall('XRANGE', KEYS[3], ARGV[1] == '-' and '-' or '(' .. ARGV[1], '+')
  if events.err then
    events = {}
  elseif events[1] then
    fed = events[#events][1]
  end
end
local is_held = held ~= '0' and string.find(saved, '1', 1, true)
local owner = redis.pcall('HMGET', KEYS[1], 'workspace_id', 'user_id')
local reply = {'ok', fed, created_at, status .. (is_held and ':held' or ':free'), ended_at or '',
  ever or '', changes, owner[1] or '', owner[2] or '', string.format('%.0f', activity), deadline,
  catalogue, tostring(#saved)}
for step = 1, #saved do
  reply[#reply + 1] = redis.call('HGET', KEYS[2], 's' .. step) or ''
end
for _, event in ipairs(events) do
  reply[#reply + 1] = tostring(#event[2])
  for _, value in ipairs(event[2]) do
    reply[#reply + 1] = value
  end
end
return reply
