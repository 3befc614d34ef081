-- include session.lua
-- Make a session that is not there yet, with the file that it begins with, if there is one.
--
-- KEYS  with a file: 5 the upload, from 6 its parts, which are there already
-- ARGV  6 session id, 7 catalogue pin, 8 number of steps, 9 number of values about the file (0 =
--       none), then field and value of each, then field and value of the metadata
--
-- Returns {'ok', session id, created_at in Unix ms, deadline in Unix ms, number of steps},
--         {'exists'}, {'part_lost'} when the file is not whole any more
--
-- Safe to send twice: see session.lua.

if state.status then
  return {'exists'}
end

local file_values = tonumber(ARGV[9])
if file_values > 0 then
  for i = 6, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 0 then
      return {'part_lost'}
    end
  end
  redis.call('HSET', KEYS[5], unpack(ARGV, 10, 9 + file_values))
  for i = 6, #KEYS do
    redis.call('HSET', OPS, 'part:' .. KEYS[i], 'kept')
  end
end
redis.call('HSET', METADATA, 'created_at', at_ms, unpack(ARGV, 10 + file_values))
state.saved = string.rep('0', tonumber(ARGV[8]))
change('status', 'pending', 'saved', state.saved, 'highest', '0', 'created_at', at_ms,
  'finalized_at', '', 'revision', '0', 'catalogue', ARGV[7])
record('session_created')
return answer({'ok', ARGV[6], at_ms, deadline, ARGV[8]})
