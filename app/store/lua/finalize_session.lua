-- include session.lua
-- Freeze a session: keep its export and lock its steps, if nothing changed since it was read.
--
-- KEYS  5 the export, 6 the queue of jobs, where it lies beside the session
-- ARGV  6 count of changes when the session was read ('' = only let an Idempotency-Key keep
--         the export of a session that is finalized),
--       7 the export, 8 id of the session for the queue ('' = leave the queue alone)
--
-- Returns {'ok', completed steps, number of steps, finalized_at in Unix ms}, {'not_found'}, {'changed'},
--         {'finalized'} when somebody else was first; an Idempotency-Key then keeps their export.
-- What an Idempotency-Key keeps has the export as a last part, because a later revision
-- replaces the stored one and a repeat must still answer the first.
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
local _, completed = string.gsub(state.saved, '1', '')
local steps = whole(#state.saved)
completed = whole(completed)

if state.finalized_at ~= '' then
  if idempotency then
    local export = redis.call('GET', KEYS[5])
    if export then
      answer({'finalized'}, {'ok', completed, steps, state.finalized_at, export})
    end
  end
  return {'finalized'}
end
if state.changes ~= ARGV[6] then
  return {'changed'}
end

if ARGV[8] ~= '' then
  -- A queue that is none fails here, before anything is written, and not after.
  redis.call('XLEN', KEYS[6])
end
redis.call('SET', KEYS[5], ARGV[7], 'PXAT', deadline)
local revision = whole(tonumber(state.revision) + 1)
state.held = '0'
change('finalized_at', at_ms, 'revision', revision, 'held', state.held,
  'export_lost', '0')
record('finalized', 'revision', revision)
if ARGV[8] ~= '' then
  -- What is older than a session lives waits for nobody any more.
  redis.call('XADD', KEYS[6], 'MINID', '~', whole(math.max(0, now_ms - lifetime_ms)), '*',
    'session_id', ARGV[8], 'revision', revision)
end
return answer({'ok', completed, steps, at_ms}, {'ok', completed, steps, at_ms, ARGV[7]})
