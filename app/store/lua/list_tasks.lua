-- include tasks.lua
-- Read a part of a list of tasks, newest first, and the tasks that lie beside it.
--
-- KEYS  1 the entries, 2 the same by when they expire
-- ARGV  1 only entries before this one ('' = from the newest), 2 most entries, 3 how the keys of
--       tasks begin ('' = they lie elsewhere), then the fields to read
--
-- Returns {'ok', number of tasks in the whole list, 1 when there are more entries or 0,
--         entries, tasks} with a task as the values of its fields, or 'damaged'
--
-- Safe to send twice: it reads.

local newest = ARGV[1] == '' and '+' or '(' .. ARGV[1]
local limit = tonumber(ARGV[2])
local entries = redis.call('ZREVRANGEBYLEX', KEYS[1], newest, '-', 'LIMIT', 0, limit + 1)
local more = #entries > limit and 1 or 0
entries[limit + 1] = nil
local total = redis.call('ZCOUNT', KEYS[2], whole(now_ms), '+inf')
return {'ok', total, more, entries, read_tasks(entries, ARGV[3], unpack(ARGV, 4))}
