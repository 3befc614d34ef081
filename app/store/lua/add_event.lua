-- include session.lua
-- Add a report of progress to the log, whatever the status is.
--
-- KEYS  none of its own
-- ARGV  6 stage, 7 progress in percent, 8 message ('' = none), 9 id that the sender gave ('' = none),
--       10 name of the run that reports ('' = it has none)
--
-- Returns {'ok', id, stage, progress, message, time in Unix ms},
--         {'repeated', the same of the first one} when its sender's id was taken before,
--         {'not_found'}, {'superseded'} when another run has followed the one that reports
--
-- Safe to send twice: see session.lua. A sender's id is remembered at least as long as its event
-- is in the log.

if not state.status then
  return {'not_found'}
end
local stage, percent, message, given = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
if given ~= '' then
  local known = redis.call('HGET', OPS, 'event:' .. given)
  local first = known and redis.call('XRANGE', EVENTS, known, known)[1]
  if first then
    local told = {}
    for i = 1, #first[2], 2 do
      told[first[2][i]] = first[2][i + 1]
    end
    return answer({'repeated', known, told.stage, told.progress, told.message or '', told.at})
  end
end

local run = redis.call('HMGET', PROGRESS, 'percent', 'run_at', 'run')
if ARGV[10] ~= '' and run[3] ~= ARGV[10] then
  return {'superseded'}
end
local fields = {'percent', percent, 'stage', stage, 'message', message, 'reported_at', at_ms}
if not run[2] or run[2] == '' or tonumber(percent) < (tonumber(run[1]) or 0) then
  -- The first report without a run, or a run that began anew: the pace is measured from here.
  fields[9], fields[10], fields[11], fields[12] = 'run_at', at_ms, 'run_percent', percent
end
change(unpack(fields))
local about = {'stage', stage, 'progress', percent}
if message ~= '' then
  about[#about + 1], about[#about + 2] = 'message', message
end
if given ~= '' then
  about[#about + 1], about[#about + 2] = 'event_id', given
end
local taken = {record('progress', unpack(about)), stage, percent, message, at_ms}
if given ~= '' then
  redis.call('HSET', OPS, 'event:' .. given, taken[1])
end
return answer({'ok', unpack(taken)})
