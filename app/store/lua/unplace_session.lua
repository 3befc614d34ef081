-- include room.lua
-- Take a session out of the index that lies in another slot, and tell the feed what became of it.
--
-- KEYS  1 entries
-- ARGV  1 session, 2 type and 3 reason of what the feed says, 4 the caller's time in Unix ms,
--       5 leave a reservation alone that was made later than this in Unix ms ('' = none)
--
-- Returns {'ok'}, {'absent'} when it was out already, {'spared'}
--
-- Safe to send twice: a repeat finds it out.

local entry = read_entry(ARGV[1])
if entry and entry.changes == '0' and ARGV[5] ~= '' then
  -- One that is about to be made has its place before it is there.
  local activity = redis.call('ZSCORE', INDEX .. 'activity:' .. entry.class, ARGV[1])
  if activity and tonumber(activity) > tonumber(ARGV[5]) then
    return {'spared'}
  end
end
local is_condemned = redis.call('SISMEMBER', INDEX .. 'condemned', ARGV[1]) == 1
if not unplace(ARGV[1]) or is_condemned then
  -- What lost its room was told of then.
  return {'absent'}
end
report_end(ARGV[1], ARGV[2], ARGV[3], ARGV[4])
return {'ok'}
