-- include room.lua
-- Reserve room for a session that is about to be made in another slot.
--
-- KEYS  1 entries
-- ARGV  1 session, 2 creation in Unix ms, 3 lifetime in ms, 4 most sessions there may be unless
--       operators have said otherwise (0 = any number), 5 'refuse' or 'evict_oldest', 6 catalogue pin,
--       7 '1' = what is over its time was looked at already
--
-- Returns {'ok', session to remove first, ...}, {'capacity_reached', session to remove, ...} when
--         there is no room, or there are too many for one call to make it
--
-- Safe to send twice: a session that has room keeps it, and what is to be removed for it stays
-- condemned until it is.

local id = ARGV[1]
if read_entry(id) then
  return {'ok', unpack(redis.call('SMEMBERS', INDEX .. 'condemned'))}
end
local now_ms = store_time_ms()
local limit = room_limit(tonumber(ARGV[4]))
local victims = {}
if limit > 0 then
  if ARGV[7] == '' and redis.call('ZCARD', DEADLINES) >= limit
    and redis.call('ZCOUNT', DEADLINES, '-inf', whole(now_ms)) > 0 then
    return {'capacity_reached'}
  end
  -- What is over its time counts until it is known to be gone: only its own slot can tell.
  while redis.call('ZCARD', DEADLINES) >= limit do
    local victim = ARGV[5] == 'evict_oldest' and #victims < 100 and oldest_session()
    if not victim then
      return {'capacity_reached', unpack(victims)}
    end
    unplace(victim)
    redis.call('SADD', INDEX .. 'condemned', victim)
    report_end(victim, 'evicted', 'capacity', ARGV[2])
    victims[#victims + 1] = victim
  end
end
place(id, {
  created = ARGV[2], class = 'pending:free', ended = '', ever = '', changes = '0', fed = '-',
  workspace = '', user = '', activity = ARGV[2], catalogue = ARGV[6],
  deadline = whole(now_ms + tonumber(ARGV[3])),
  saved_at = function() return nil end,
})
return {'ok', unpack(victims)}
