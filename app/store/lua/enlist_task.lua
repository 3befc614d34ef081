-- include tasks.lua
-- Put a task on lists that do not lie beside it, or have it expire later there.
--
-- KEYS  the lists, two keys each
-- ARGV  1 life in ms, 2 entry, 3 how many of the lists, from the first, expire with their tasks
--
-- Returns {'ok'}
--
-- Safe to send twice: it says the same again.

check_lists(1)
enlist(1, tonumber(ARGV[3]), ARGV[2], tonumber(ARGV[1]))
return {'ok'}
