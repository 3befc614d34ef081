-- include clock.lua
-- Take as many tokens out of a bucket as are there, up to a number.
--
-- It holds `quota` tokens at most and fills at an even pace, from empty to full in the window. What is
-- kept is what it lacks, in tokens times the window: in that unit a millisecond brings `quota`, so
-- everything is an integer below 2^53, and nothing is lost by rounding.
--
-- KEYS  1 the bucket: what it lacked, and when that was in Unix ms; not there while it is full
-- ARGV  1 quota, 2 window in ms, 3 how many are wanted, 1 or more
--
-- Returns {'ok', how many were taken, how many are left, ms until there is one more}
--
-- Safe to send twice: a repeat takes again, which lets less through and never more.

local quota, window_ms, wanted = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3])
local now_ms, capacity = store_time_ms(), quota * window_ms
local lacked, at_ms = string.match(redis.call('GET', KEYS[1]) or '', '^(%d+) (%d+)$')

local lacks = 0
if lacked then
  -- A clock that was set back brings nothing for what it repeats, and the bucket fills from there on.
  -- One that was made for another limit lacks no more than all.
  lacks = math.min(tonumber(lacked), capacity) - math.max(0, now_ms - tonumber(at_ms)) * quota
  lacks = math.max(0, lacks)
end
local taken = math.min(wanted, math.floor((capacity - lacks) / window_ms))
lacks = lacks + taken * window_ms
local left = math.floor((capacity - lacks) / window_ms)
local next_ms = math.ceil((lacks - (quota - left - 1) * window_ms) / quota)
redis.call('SET', KEYS[1], whole(lacks) .. ' ' .. whole(now_ms), 'PX', whole(math.ceil(lacks / quota)))
return {'ok', taken, left, next_ms}
