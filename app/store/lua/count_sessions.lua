-- include room.lua
-- Count the sessions in every way that operators ask for. The number of commands is the same for
-- any number of sessions.
--
-- KEYS  1 entries
-- ARGV  1 most sessions there may be unless operators have said otherwise (0 = any number),
--       2 catalogue pin of the funnel, from 3 moments in Unix ms
--
-- Returns {'ok', limit, sum of all creations in Unix s, place of the oldest or '', of the newest or
--          '', {class, count, ...}, {count of sessions made at each moment or later, ...},
--          {field, value, ...} of the clean-ups, of the funnel}
--
-- Safe to send twice: it reads.

local classes, ages, oldest, newest = {}, {}, '', ''
for i = 3, #ARGV do
  ages[i - 2] = 0
end
for _, class in ipairs(CLASSES) do
  local set = INDEX .. 'created:' .. class
  classes[#classes + 1], classes[#classes + 2] = class, redis.call('ZCARD', set)
  for i = 3, #ARGV do
    local since = '[' .. string.rep('0', 16 - #ARGV[i]) .. ARGV[i]
    ages[i - 2] = ages[i - 2] + redis.call('ZLEXCOUNT', set, since, '+')
  end
  local first = redis.call('ZRANGE', set, 0, 0)[1]
  local last = redis.call('ZRANGE', set, -1, -1)[1]
  if first and (oldest == '' or first < oldest) then
    oldest = first
  end
  if last and last > newest then
    newest = last
  end
end
return {'ok', string.format('%d', room_limit(tonumber(ARGV[1]))),
  redis.call('HGET', ENTRIES, CREATED_S) or '0', oldest, newest, classes, ages,
  redis.call('HGETALL', INDEX .. 'cleanup'), redis.call('HGETALL', INDEX .. 'funnel:' .. ARGV[2])}
