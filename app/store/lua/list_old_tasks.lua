-- include tasks.lua
-- Read the tasks of a list that expire first, expired ones included.
--
-- KEYS  1 the entries by when they expire
-- ARGV  1 how long they have still to live at most, in ms, 2 how many to pass over, 3 most entries,
--       4 how the keys of tasks begin ('' = they lie elsewhere), then the fields to read
--
-- Returns {'ok', entries, tasks} with a task as the values of its fields, or 'damaged'
--
-- Safe to send twice: it reads.

local until_ms = whole(now_ms + tonumber(ARGV[1]))
local entries = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', until_ms, 'LIMIT', ARGV[2], ARGV[3])
return {'ok', entries, read_tasks(entries, ARGV[4], unpack(ARGV, 5))}
