-- include room.lua
-- Give back the room that was reserved for a session which was not made.
--
-- KEYS  1 entries
-- ARGV  1 session
--
-- Returns {'ok'}
--
-- Safe to send twice: a repeat finds it given back.

local entry = read_entry(ARGV[1])
if entry and entry.changes == '0' then
  unplace(ARGV[1])
end
return {'ok'}
