-- include clock.lua
-- Count a question that is about to be asked, unless there were too many within the last second.
--
-- KEYS  1 when the last questions were asked, newest first, in Unix ms
-- ARGV  1 how many there may be within a second
--
-- Returns {'ok'}, {'too_many'}
--
-- Safe to send twice: a repeat counts once more, which lets one question less through.

local now_ms, most = store_time_ms(), tonumber(ARGV[1])
-- The one that this would be the `most`-th after: together they must not lie within a second.
local before = redis.call('LINDEX', KEYS[1], most - 1)
-- A clock that was set back holds nobody up.
if before and now_ms - tonumber(before) < 1000 and tonumber(before) <= now_ms then
  return {'too_many'}
end
redis.call('LPUSH', KEYS[1], whole(now_ms))
redis.call('LTRIM', KEYS[1], 0, most - 1)
redis.call('PEXPIRE', KEYS[1], 1000)
return {'ok'}
