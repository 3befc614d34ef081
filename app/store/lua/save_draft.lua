-- include session.lua
-- Keep a draft of a step. It has a life of its own, not beyond the session's, and makes no event.
--
-- KEYS  5 the draft
-- ARGV  6 catalogue pin, 7 number of the step, 8 the caller's time as RFC 3339,
--       9 life of the draft in ms, 10 the answers as JSON
--
-- Returns {'ok', version of the saved step or '', the caller's time in Unix ms}, {'not_found'}, {'other_catalogue', pin},
--         {'finalized'}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
if state.catalogue ~= ARGV[6] then
  return {'other_catalogue', state.catalogue}
end
if state.finalized_at ~= '' then
  return {'finalized'}
end

local number = tonumber(ARGV[7])
local until_ms = whole(math.min(now_ms + tonumber(ARGV[9]), deadline_ms))
redis.call('SET', KEYS[5], '{"step_id":' .. ARGV[7] .. ',"draft_id":"' .. operation
  .. '","saved_at":"' .. ARGV[8] .. '","data":' .. ARGV[10] .. '}', 'PXAT', until_ms)
local version = ''
if string.sub(state.saved, number, number) == '1' then
  version = redis.call('HGET', PROGRESS, 'v' .. ARGV[7])
end
return answer({'ok', version, at_ms})
