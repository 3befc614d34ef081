-- include clock.lua
-- Nothing is done for a sending that comes too late: put before every script whose answer is a promise.
--
-- Whoever sent it has given it up by then. They may have sent it again, and others may have gone on
-- from there: what they removed would come back, and an older value would win over theirs.
--
-- KEYS  none of its own
-- ARGV  1 when this was sent in Unix ms, as its sender takes the store's clock to go, and for how many
--       ms its sender waits, with a space between
--
-- Returns before the script begins: {'late', the store's time in Unix ms} when the clock is further
-- from the one than the other says, before it or after. It gives `now_ms`.
--
-- Safe to send twice: it reads the clock. Who is still waiting learns from the answer how the store's
-- clock goes, and sends again.

local now_ms = store_time_ms()
do
  local sent_ms, wait_ms = string.match(ARGV[1], '^(%d+) (%d+)$')
  if math.abs(now_ms - sent_ms) > tonumber(wait_ms) then
    return {'late', whole(now_ms)}
  end
end

