-- include session.lua
-- Drop the draft of a step. Makes no event.
--
-- KEYS  5 the draft
-- ARGV  6 number of the step
--
-- Returns {'ok', draft or '' when it was damaged, version of the saved step or ''}, {'not_found'}, {'out_of_range', number of steps}, {'draft_not_found'},
--         {'finalized'}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
if tonumber(ARGV[6]) > #state.saved then
  return {'out_of_range', whole(#state.saved)}
end
local draft = redis.pcall('GET', KEYS[5])
if not draft then
  return {'draft_not_found'}
end
if state.finalized_at ~= '' then
  return {'finalized'}
end

redis.call('DEL', KEYS[5])
if type(draft) ~= 'string' or not string.find(draft, '^{"step_id":%d+,"draft_id":"%x+"') then
  draft = ''
end
local version = ''
local number = tonumber(ARGV[6])
if string.sub(state.saved, number, number) == '1' then
  version = redis.call('HGET', PROGRESS, 'v' .. ARGV[6])
end
return answer({'ok', draft, version})
