-- include room.lua
-- Take entries out of a part of the index that point at nothing. Only without hash tags.
--
-- KEYS  1 entries
-- ARGV  1 where the part begins ('0' = at the beginning), 2 how many entries to look at, about
--
-- Returns {'ok', where the next part begins ('0' = that was all), how many were taken out}
--
-- Safe to send twice: a repeat finds less.

local found = redis.call('HSCAN', KEYS[1], ARGV[1], 'COUNT', ARGV[2])
local removed = 0
for i = 1, #found[2], 2 do
  local id = found[2][i]
  local prefix = 'onboarding:' .. id .. ':'
  if string.sub(id, 1, 1) ~= ':' and redis.call('EXISTS', prefix .. 'metadata', prefix .. 'progress') == 0 then
    unplace(id)
    report_end(id, 'expired', 'lifetime', whole(store_time_ms()))
    removed = removed + 1
  end
end
return {'ok', tostring(found[1]), string.format('%d', removed)}
