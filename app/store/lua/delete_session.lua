-- Remove every key of a session, damaged ones too.
--
-- KEYS  1 metadata, 2 progress, 3 events, 4 ops
-- ARGV  1 attempt (1 = first), 2 number of steps to look for at least
--
-- Returns {'ok'}, {'not_found'}
--
-- Safe to send twice: the memory of operations goes with the session, so a repeat (attempt 2 and
-- later) that finds nothing takes it that an earlier sending did the work.

local prefix = string.sub(KEYS[2], 1, -#'progress' - 1)
local keys = {KEYS[1], KEYS[2], KEYS[3], KEYS[4], prefix .. 'export'}

local saved = redis.pcall('HGET', KEYS[2], 'saved')
local steps = math.max(type(saved) == 'string' and #saved or 0, tonumber(ARGV[2]))
for step = 1, steps do
  keys[#keys + 1] = prefix .. 'step:' .. step
  keys[#keys + 1] = prefix .. 'draft:' .. step
end

local memory = redis.pcall('HKEYS', KEYS[4])
for _, field in ipairs(memory) do
  if string.sub(field, 1, 4) == 'key:' then
    keys[#keys + 1] = string.sub(field, 5)
  end
end

local removed = 0
for i = 1, #keys, 1000 do
  removed = removed + redis.call('DEL', unpack(keys, i, math.min(i + 999, #keys)))
end
if removed == 0 and tonumber(ARGV[1]) == 1 then
  return {'not_found'}
end
return {'ok'}
