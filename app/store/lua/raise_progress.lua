-- include session.lua
-- Raise the high-water mark, the highest step that was reached. It never falls, and makes no event.
--
-- KEYS  none of its own
-- ARGV  6 the step, 0 to the number of steps
--
-- Returns {'ok', saved, highest, created_at, updated_at}, {'not_found'},
--         {'out_of_range', number of steps}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
local step = tonumber(ARGV[6])
if step > #state.saved then
  return {'out_of_range', whole(#state.saved)}
end

if step > tonumber(state.highest) then
  state.highest = whole(step)
  change('highest', state.highest)
end
return answer({'ok', state.saved, state.highest, state.created_at, state.updated_at})
