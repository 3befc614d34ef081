-- include sending.lua
-- include parts.lua
-- Write the hashes of a damaged session anew, and remove what of it cannot be read.
--
-- KEYS  1 metadata, 2 progress, 3 events, 4 ops
-- ARGV  1 the sending (sending.lua), 2 operation id, 3 lifetime in ms, 4 the caller's time in Unix ms,
--       5 count of changes that the session had when it was read ('' = none that could be read),
--       6 number of names of keys to remove, then these, then number of ids of events to remove, then
--       these, then number of values of the progress, then field and value of each, then field and
--       value of the metadata
--
-- Returns {'ok'}, {'changed'} when 5 does not hold any more
--
-- Safe to send twice: the operation id is kept in the progress that it wrote.

if redis.pcall('HGET', KEYS[2], 'mended_by') == ARGV[2] then
  return {'ok'}
end
local changes = redis.pcall('HGET', KEYS[2], 'changes')
if (type(changes) == 'string' and changes or '') ~= ARGV[5] then
  return {'changed'}
end

-- Both hashes are written beside the old ones first: a full store refuses that before anything is
-- removed.
local prefix = string.sub(KEYS[2], 1, -#'progress' - 1)
local at = 6 + tonumber(ARGV[6])
local last_event = at + 1 + tonumber(ARGV[at + 1])
local last = last_event + 1 + tonumber(ARGV[last_event + 1])
local deadline = whole(now_ms + tonumber(ARGV[3]))
local progress, metadata = prefix .. 'mended:progress', prefix .. 'mended:metadata'
redis.call('HSET', progress, unpack(ARGV, last_event + 2, last))
redis.call('HSET', progress, 'mended_by', ARGV[2], 'updated_at', ARGV[4], 'deadline', deadline,
  'changes', whole((string.find(ARGV[5], '^%d+$') and #ARGV[5] < 16 and tonumber(ARGV[5]) or 0) + 1))
redis.call('HSET', metadata, unpack(ARGV, last + 1))
redis.call('PEXPIREAT', progress, deadline)
redis.call('PEXPIREAT', metadata, deadline)

for i = 7, at do
  for _, part in ipairs(parts_of(prefix .. ARGV[i])) do
    redis.call('DEL', part)
  end
  redis.call('DEL', ARGV[i] == 'tokens' and tokens_of(prefix) or prefix .. ARGV[i])
end
for i = at + 2, last_event do
  redis.call('XDEL', KEYS[3], ARGV[i])
end
-- A memory that says what no script has written would fail every write from now on.
local memory = redis.pcall('HGETALL', KEYS[4])
for i = 1, memory.err and 0 or #memory, 2 do
  local kind, value = string.match(memory[i], '^(%a+):'), memory[i + 1]
  local is_sound = value == 'kept' or tonumber(value) ~= nil
  if kind == 'event' then
    is_sound = string.find(value, '^%d+%-%d+$') ~= nil
  elseif not kind and memory[i] ~= 'turn' then
    is_sound = string.find(memory[i], '^%d+:') and pcall(cjson.decode, value)
  end
  if not is_sound then
    redis.call('HDEL', KEYS[4], memory[i])
  end
end

redis.call('RENAME', metadata, KEYS[1])
redis.call('RENAME', progress, KEYS[2])
return {'ok'}
