-- The store's own clock: put before the scripts that ask for it.
--
-- KEYS  none of its own
-- ARGV  none of its own
--
-- Returns nothing: it gives `store_time_ms`, and `whole`, which writes a number without a fraction.
--
-- Safe to send twice: it only defines.

local function whole(number)
  return string.format('%.0f', number)
end

local function store_time_ms()
  local time = redis.call('TIME')
  return tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end

