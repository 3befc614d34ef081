-- The store's own clock: put before the scripts that ask for it.
--
-- KEYS  none of its own
-- ARGV  none of its own
--
-- Returns nothing: it gives `store_time_ms`, one time for all of a script, and `whole`, which writes a
-- number without a fraction.
--
-- Safe to send twice: it only defines.

local function whole(number)
  return string.format('%.0f', number)
end

local time_ms

local function store_time_ms()
  if not time_ms then
    local time = redis.call('TIME')
    time_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
  end
  return time_ms
end

