-- Read the record after a place, all its streams in one order.
--
-- KEYS  the streams
-- ARGV  1 id to go on after, 2 most events to read
--
-- Returns {'ok', events as {number of their key, id, {field, value, ...}}}
--
-- Safe to send twice: it reads.

local found = {}
for stream = 1, #KEYS do
  for _, entry in ipairs(redis.call('XRANGE', KEYS[stream], '(' .. ARGV[1], '+', 'COUNT', ARGV[2])) do
    local ms, count = string.match(entry[1], '^(%d+)-(%d+)$')
    -- As wide as an id can be, so that they compare as texts.
    local order = string.rep('0', 20 - #ms) .. ms .. string.rep('0', 20 - #count) .. count
    found[#found + 1] = {order, {stream, entry[1], entry[2]}}
  end
end
table.sort(found, function(one, other) return one[1] < other[1] end)
local events = {}
for i = 1, math.min(#found, tonumber(ARGV[2])) do
  events[i] = found[i][2]
end
return {'ok', events}
