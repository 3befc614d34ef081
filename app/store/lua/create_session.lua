-- include session.lua
-- Make a session that is not there yet.
--
-- KEYS  none of its own
-- ARGV  6 session id, 7 catalogue pin, 8 number of steps, from 9 field and value of the metadata
--
-- Returns {'ok', session id, created_at in Unix ms, deadline in Unix ms, number of steps},
--         {'exists'}
--
-- Safe to send twice: see session.lua.

if state.status then
  return {'exists'}
end

redis.call('HSET', METADATA, 'created_at', at_ms, unpack(ARGV, 9))
state.saved = string.rep('0', tonumber(ARGV[8]))
change('status', 'pending', 'saved', state.saved, 'highest', '0', 'created_at', at_ms,
  'finalized_at', '', 'revision', '0', 'catalogue', ARGV[7])
record('session_created')
return answer({'ok', ARGV[6], at_ms, deadline, ARGV[8]})
