-- include session.lua
-- Drop the draft of a step. Makes no event.
--
-- KEYS  5 the draft
-- ARGV  none of its own
--
-- Returns {'ok'}, {'not_found'}, {'draft_not_found'}, {'finalized'}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
if redis.call('EXISTS', KEYS[5]) == 0 then
  return {'draft_not_found'}
end
if state.finalized_at ~= '' then
  return {'finalized'}
end

redis.call('DEL', KEYS[5])
return answer({'ok'})
