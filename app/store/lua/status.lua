-- include session.lua
-- The status of a generation: put before the scripts that ask for it.
--
-- KEYS  as session.lua
-- ARGV  as session.lua
--
-- Returns nothing: it gives `may_enter` and `enter`.
--
-- Safe to send twice: it only defines.

-- Say whether a status may follow the current one; `after` are those that it may, as
-- '|pending|error|'.
local function may_enter(after)
  return string.find(after, '|' .. state.status .. '|', 1, true) ~= nil
end

-- What a run is for; 0 while the steps are open.
local function run_revision()
  return state.finalized_at ~= '' and state.revision or '0'
end

local function enter(status, error_message, run)
  state.status = status
  state.ended_at = status ~= 'processing' and at_ms or ''
  if status == 'processing' then
    -- A run begins: what was said of the one before it is over.
    change('status', status, 'ended_at', '', 'percent', '0', 'stage', '', 'message', '',
      'error_message', '', 'reported_at', at_ms, 'run_at', at_ms, 'run_percent', '0', 'run', run,
      'run_revision', run_revision())
    record('status_changed', 'status', status)
  elseif status == 'complete' then
    change('status', status, 'ended_at', at_ms, 'percent', '100', 'error_message', '',
      'reported_at', at_ms)
    record('status_changed', 'status', status)
  else
    change('status', status, 'ended_at', at_ms, 'error_message', error_message, 'reported_at', at_ms)
    if error_message == '' then
      record('status_changed', 'status', status)
    else
      record('status_changed', 'status', status, 'error_message', error_message)
    end
  end
end

