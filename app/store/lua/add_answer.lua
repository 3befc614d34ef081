-- include session.lua
-- Keep a question with its answer, of which the last ones stay, and count it. It makes no event.
--
-- KEYS  5 the history
-- ARGV  6 the question with its answer as JSON, 7 how long the answer took in ms, 8 how many are kept
--
-- Returns {'ok'}, {'not_found'}, {'damaged', key} when the counts cannot be read
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
-- A history that is none fails here, before anything is written, and not after.
local kept = redis.call('LLEN', KEYS[5])
local counts = redis.call('HMGET', PROGRESS, 'request_count', 'total_processing_ms')
for i = 1, 2 do
  if counts[i] and not string.find(counts[i], '^%d+$') then
    return {'damaged', PROGRESS}
  end
end

redis.call('RPUSH', KEYS[5], ARGV[6])
redis.call('LTRIM', KEYS[5], '-' .. ARGV[8], -1)
if kept == 0 then
  redis.call('PEXPIREAT', KEYS[5], deadline)
end
redis.call('HSET', PROGRESS, 'request_count', whole(tonumber(counts[1] or 0) + 1),
  'total_processing_ms', whole(tonumber(counts[2] or 0) + tonumber(ARGV[7])))
return answer({'ok'})
