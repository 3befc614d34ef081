-- include parts.lua
-- Remove every key of a session, damaged ones too, and tell who follows it.
--
-- KEYS  1 metadata, 2 progress, 3 events, 4 ops
-- ARGV  1 attempt (1 = first), 2 number of steps to look for at least,
--       3 the caller's time in Unix ms
--
-- Returns {'ok'}, {'not_found'}
--
-- Safe to send twice: the memory of operations goes with the session, so a repeat (attempt 2 and
-- later) that finds nothing takes it that an earlier sending did the work.

local prefix = string.sub(KEYS[2], 1, -#'progress' - 1)
local keys = {KEYS[1], KEYS[2], KEYS[3], KEYS[4], prefix .. 'export'}
for _, body in ipairs({'result', 'upload'}) do
  keys[#keys + 1] = prefix .. body
  for _, part in ipairs(parts_of(prefix .. body)) do
    keys[#keys + 1] = part
  end
end

local saved = redis.pcall('HGET', KEYS[2], 'saved')
local steps = math.max(type(saved) == 'string' and #saved or 0, tonumber(ARGV[2]))
for step = 1, steps do
  keys[#keys + 1] = prefix .. 'step:' .. step
  keys[#keys + 1] = prefix .. 'draft:' .. step
end

local memory = redis.pcall('HKEYS', KEYS[4])
for _, field in ipairs(memory) do
  local kind, key = string.match(field, '^(%a+):(.*)$')
  if kind == 'key' or kind == 'part' then
    keys[#keys + 1] = key
  end
end

-- The last event is not kept: its id goes on from the log that it ends.
local time = redis.call('TIME')
local id_ms, sequence = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000), 0
local newest = redis.pcall('XREVRANGE', KEYS[3], '+', '-', 'COUNT', 1)
if not newest.err and newest[1] then
  local ms, count = string.match(newest[1][1], '^(%d+)-(%d+)$')
  if tonumber(ms) >= id_ms then
    id_ms, sequence = tonumber(ms), tonumber(count) + 1
  end
end

local removed = 0
for i = 1, #keys, 1000 do
  removed = removed + redis.call('DEL', unpack(keys, i, math.min(i + 999, #keys)))
end
if removed == 0 and tonumber(ARGV[1]) == 1 then
  return {'not_found'}
end
if removed > 0 then
  redis.pcall('PUBLISH', KEYS[3], string.format('deleted %.0f-%.0f %s', id_ms, sequence, ARGV[3]))
end
return {'ok'}
