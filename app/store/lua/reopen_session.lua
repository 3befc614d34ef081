-- include session.lua
-- Unlock the steps of a finalized session. The export and the result stay readable.
--
-- KEYS  none of its own
-- ARGV  none of its own
--
-- Returns {'ok', metadata, progress} as field and value lists, {'not_found'}, {'not_finalized'},
--         {'generation_running'}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
if state.finalized_at == '' then
  return {'not_finalized'}
end
if state.status == 'processing' then
  return {'generation_running'}
end

state.status, state.ended_at = 'pending', ''
change('finalized_at', '', 'status', 'pending', 'ended_at', '', 'percent', '0', 'stage', '', 'message', '',
  'error_message', '', 'reported_at', at_ms, 'run_at', '', 'run_percent', '0', 'run', '')
record('reopened', 'revision', state.revision)
if moved then
  redis.call('HSET', PROGRESS, 'deadline', deadline)
end
return answer({'ok', redis.call('HGETALL', METADATA), redis.call('HGETALL', PROGRESS)})
