-- include clock.lua
-- Take entries off lists of tasks.
--
-- KEYS  the lists, two keys each
-- ARGV  the entries
--
-- Returns {'ok', how many of them the first list held whose tasks had not expired}
--
-- Safe to send twice: what is gone stays gone.

local now_ms, unexpired = store_time_ms(), 0
for _, entry in ipairs(ARGV) do
  local deadline_ms = tonumber(redis.call('ZSCORE', KEYS[2], entry) or 0)
  if deadline_ms >= now_ms then
    unexpired = unexpired + 1
  end
  for _, key in ipairs(KEYS) do
    redis.call('ZREM', key, entry)
  end
end
return {'ok', unexpired}
