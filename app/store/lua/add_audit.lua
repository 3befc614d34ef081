-- include clock.lua
-- Keep what was done and what was refused, each in a stream of its own: however much is refused,
-- what was done stays.
--
-- KEYS  1 what was done, 2 what was refused, 3 the number of the writer's last batch
-- ARGV  1 number of this batch, 2 how many events each stream keeps at least, 3 how long the number is
--       kept, in ms, then six values for each event: '1' when it was refused or '', its time in Unix
--       ms, who, action, outcome, session ('' = none)
--
-- Returns {'ok'}, {'repeated'} when this batch, or a later one of the same writer, is there already
--
-- Safe to send twice: a writer numbers its batches, and sends none before the one ahead of it is kept.

if tonumber(redis.call('GET', KEYS[3]) or 0) >= tonumber(ARGV[1]) then
  return {'repeated'}
end
-- Ids rise over both streams: one of them tells how far somebody has read.
local id_ms, sequence = store_time_ms(), 0
for stream = 1, 2 do
  local newest = redis.call('XREVRANGE', KEYS[stream], '+', '-', 'COUNT', 1)[1]
  if newest then
    local ms, count = string.match(newest[1], '^(%d+)-(%d+)$')
    ms, count = tonumber(ms), tonumber(count)
    if ms > id_ms or (ms == id_ms and count >= sequence) then
      id_ms, sequence = ms, count + 1
    end
  end
end
for i = 4, #ARGV, 6 do
  local fields = {'at', ARGV[i + 1], 'who', ARGV[i + 2], 'action', ARGV[i + 3], 'outcome', ARGV[i + 4]}
  if ARGV[i + 5] ~= '' then
    fields[9], fields[10] = 'session_id', ARGV[i + 5]
  end
  redis.call('XADD', KEYS[ARGV[i] == '1' and 2 or 1], 'MAXLEN', '~', ARGV[2],
    whole(id_ms) .. '-' .. whole(sequence), unpack(fields))
  sequence = sequence + 1
end
redis.call('SET', KEYS[3], ARGV[1], 'PX', ARGV[3])
return {'ok'}
