-- include session.lua
-- Tell that a session was recovered, and give all that is left of it one deadline and its place.
--
-- KEYS  none of its own
-- ARGV  6 how many keys were kept, 7 how many were lost
--
-- Returns {'ok'}, {'not_found'}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
moved = true
place_anew()
change()
record('recovered', 'status', state.status, 'kept', ARGV[6], 'lost', ARGV[7])
return answer({'ok'})
