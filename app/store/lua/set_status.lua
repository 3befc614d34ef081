-- include session.lua
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
-- What a run is for; 0 while the steps are open.
local run_revision = state.finalized_at ~= '' and state.revision or '0'
if state.status == status then
  if status == 'processing' and run ~= '' then
    -- Whoever takes a session over goes on in its own name.
    change('run', run, 'run_revision', run_revision)
  end
  return answer({'unchanged', at_ms, unpack(redis.call('HMGET', PROGRESS, unpack(ARGV, 10)))})
end
if not string.find(ARGV[7], '|' .. state.status .. '|', 1, true) then
  return {'invalid_transition', state.status}
end

if status == 'processing' then
  -- A run begins: what was said of the one before it is over.
  change('status', status, 'percent', '0', 'stage', '', 'message', '', 'error_message', '',
    'reported_at', at_ms, 'run_at', at_ms, 'run_percent', '0', 'run', run,
    'run_revision', run_revision)
  record('status_changed', 'status', status)
elseif status == 'complete' then
  change('status', status, 'percent', '100', 'error_message', '', 'reported_at', at_ms)
  record('status_changed', 'status', status)
else
  change('status', status, 'error_message', ARGV[8], 'reported_at', at_ms)
  if ARGV[8] == '' then
    record('status_changed', 'status', status)
  else
    record('status_changed', 'status', status, 'error_message', ARGV[8])
  end
end
return answer({'ok', at_ms, unpack(redis.call('HMGET', PROGRESS, unpack(ARGV, 10)))})
