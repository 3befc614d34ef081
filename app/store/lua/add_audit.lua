-- include clock.lua
-- Keep what happened, each kind in a stream of its own: however much there is of one, the others stay.
--
-- KEYS  1 the number of the writer's last batch, from 2 the streams
-- ARGV  1 number of this batch, 2 how many events each stream keeps at least, 3 how long the number is
--       kept, in ms, then six values for each event: the number of its stream (1 = KEYS[2]), its time
--       in Unix ms, who, action, outcome, session ('' = none)
--
-- Returns {'ok'}, {'repeated'} when this batch, or a later one of the same writer, is there already
--
-- Safe to send twice: a writer numbers its batches, and sends none before the one ahead of it is kept.

if tonumber(redis.call('GET', KEYS[1]) or 0) >= tonumber(ARGV[1]) then
  return {'repeated'}
end
-- Ids rise over all streams: one of them tells how far somebody has read.
local id_ms, sequence = store_time_ms(), 0
for stream = 2, #KEYS do
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
  redis.call('XADD', KEYS[tonumber(ARGV[i]) + 1], 'MAXLEN', '~', ARGV[2],
    whole(id_ms) .. '-' .. whole(sequence), unpack(fields))
  sequence = sequence + 1
end
redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[3])
return {'ok'}
