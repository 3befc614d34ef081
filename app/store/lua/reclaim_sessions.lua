-- include room.lua
-- Take sessions out of the index whose lifetime is over.
--
-- KEYS  1 entries
-- ARGV  1 how many at most
--
-- Returns {'ok', how many were looked at}
--
-- Safe to send twice: a repeat goes on with what is left.

return {'ok', string.format('%d', reclaim(store_time_ms(), tonumber(ARGV[1])))}
