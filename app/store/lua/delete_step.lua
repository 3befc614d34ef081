-- include session.lua
-- Remove a saved step. Its version goes on counting if it is saved again.
--
-- KEYS  5 the step
-- ARGV  6 number of the step, 7 If-Match: '' none, '*', or '|3|4|'
--
-- Returns {'ok', saved, highest, created_at, updated_at}, {'not_found'},
--         {'out_of_range', number of steps}, {'step_not_found'},
--         {'finalized'}, {'conflict', current version}, {'damaged', key}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
local number, if_match = tonumber(ARGV[6]), ARGV[7]
if number > #state.saved then
  return {'out_of_range', whole(#state.saved)}
end
if string.sub(state.saved, number, number) ~= '1' then
  return {'step_not_found'}
end
if state.finalized_at ~= '' then
  return {'finalized'}
end
local version = versions[1]
if not tonumber(version or nil) then
  return {'damaged', PROGRESS}
end
if if_match ~= '' and if_match ~= '*'
  and not string.find(if_match, '|' .. version .. '|', 1, true) then
  return {'conflict', version}
end

redis.call('DEL', KEYS[5])
state.saved = string.sub(state.saved, 1, number - 1) .. '0' .. string.sub(state.saved, number + 1)
change('saved', state.saved)
record('step_deleted', 'step_id', ARGV[6], 'version', version)
return answer({'ok', state.saved, state.highest, state.created_at, state.updated_at})
