-- include room.lua
-- Take the lease for a sweep, when one is due and nobody else has it.
--
-- KEYS  1 entries
-- ARGV  1 who asks, 2 length of the lease in ms, 3 interval between two sweeps in ms unless operators
--       have said otherwise, 4 '1' = whether it is due or not
--
-- Returns {'ok'}, {'not_due'}, {'taken'} by somebody else
--
-- Safe to send twice: who has the lease is granted it again.

local lease = INDEX .. 'lease'
local holder = redis.call('GET', lease)
if holder and holder ~= ARGV[1] then
  return {'taken'}
end
local cleanup = redis.call('HMGET', INDEX .. 'cleanup', 'last_run', 'wanted')
local last_run = tonumber(cleanup[1] or nil)
local is_due = cleanup[2] or not last_run or store_time_ms() - last_run >= cleanup_interval_ms(tonumber(ARGV[3]))
if not holder and not is_due and ARGV[4] ~= '1' then
  return {'not_due'}
end
-- A full store refuses a script whose first write takes memory, and needs the sweep most.
redis.call('DEL', lease)
if not holder then
  redis.call('HDEL', INDEX .. 'cleanup', 'wanted')
end
redis.call('SET', lease, ARGV[1], 'PX', ARGV[2])
return {'ok'}
