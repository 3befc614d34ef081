-- include room.lua
-- Count what the health of the whole is judged by.
--
-- KEYS  1 entries
-- ARGV  1 most sessions there may be unless operators have said otherwise (0 = any number),
--       2 moment in Unix ms before which a session in the making counts as stuck, 3 how many of
--       these to name, 4 interval of the clean-up in ms unless operators have said otherwise
--
-- Returns {'ok', count, limit, count of stuck ones, '1' when clean-ups go on as they should or '',
--          {stuck session, ...}}
--
-- Safe to send twice: it reads.

local now_ms = store_time_ms()
local stuck, names = 0, {}
for _, class in ipairs({'processing:free', 'processing:held'}) do
  local set = INDEX .. 'activity:' .. class
  stuck = stuck + redis.call('ZCOUNT', set, '-inf', '(' .. ARGV[2])
  local found = redis.call('ZRANGEBYSCORE', set, '-inf', '(' .. ARGV[2], 'LIMIT', 0, ARGV[3])
  for _, id in ipairs(found) do
    if #names < tonumber(ARGV[3]) then
      names[#names + 1] = id
    end
  end
end
local last_run = tonumber(redis.call('HGET', INDEX .. 'cleanup', 'last_run') or nil)
local interval_ms = cleanup_interval_ms(tonumber(ARGV[4]))
-- One that is late by more than its interval has nobody who does it.
local is_active = redis.call('EXISTS', INDEX .. 'lease') == 1
  or last_run and now_ms - last_run < 2 * interval_ms + 10000
return {'ok', count_live(now_ms),
  string.format('%d', room_limit(tonumber(ARGV[1]))), stuck, is_active and '1' or '', names}
