-- include status.lua
-- Set the status of a session's generation.
--
-- KEYS  none of its own
-- ARGV  6 the status, 7 those that it may follow as '|pending|error|', 8 the message of an error
--       ('' = none), 9 name of the run ('' = it has none), from 10 the fields to answer with
--
-- Returns {'ok', time in Unix ms, value, ...} with a value for each field,
--         {'unchanged', time in Unix ms, value, ...} when that is its status already, {'not_found'}, {'invalid_transition', current status},
--         {'superseded'} when a run ends that another one has followed
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
local status, run = ARGV[6], ARGV[9]
if status ~= 'processing' and run ~= '' and redis.call('HGET', PROGRESS, 'run') ~= run then
  return {'superseded'}
end
if state.status == status then
  if status == 'processing' and run ~= '' then
    -- Whoever takes a session over goes on in its own name.
    change('run', run, 'run_revision', run_revision())
  end
  return answer({'unchanged', at_ms, unpack(redis.call('HMGET', PROGRESS, unpack(ARGV, 10)))})
end
if not may_enter(ARGV[7]) then
  return {'invalid_transition', state.status}
end

enter(status, ARGV[8], run)
return answer({'ok', at_ms, unpack(redis.call('HMGET', PROGRESS, unpack(ARGV, 10)))})
