-- include clock.lua
-- The lists that tasks stand in: put before the scripts that ask for it.
--
-- A task is one entry in each of its lists, '<created_at in Unix ms, 16 digits>:<task id>'. A list
-- has two keys: a sorted set of entries whose scores are all 0, so that they stand in the order of
-- their names, and one of the same entries by when their tasks expire, in Unix ms.
--
-- KEYS  none of its own
-- ARGV  none of its own
--
-- Returns nothing: it gives `now_ms`, `check_lists`, `enlist`, `delist` and `read_tasks`.
--
-- Safe to send twice: it only defines, and reads the clock.

local now_ms = store_time_ms()

-- How many entries of expired tasks a list is rid of whenever one is added.
local RID_OF = 100

-- A key that is no list fails here, before anything is written, and not after.
local function check_lists(first)
  for i = first, #KEYS do
    redis.call('ZCARD', KEYS[i])
  end
end

-- Put an entry on the lists from KEYS[first], or have it expire later. The first `expiring` of them
-- look after themselves: they go with the last of their tasks, and lose what has expired.
local function enlist(first, expiring, entry, life_ms)
  local deadline = whole(now_ms + life_ms)
  for i = first, #KEYS, 2 do
    redis.call('ZADD', KEYS[i], 0, entry)
    redis.call('ZADD', KEYS[i + 1], deadline, entry)
    if i < first + 2 * expiring then
      redis.call('PEXPIREAT', KEYS[i], deadline)
      redis.call('PEXPIREAT', KEYS[i + 1], deadline)
      local expired = redis.call('ZRANGEBYSCORE', KEYS[i + 1], '-inf', '(' .. whole(now_ms),
        'LIMIT', 0, RID_OF)
      if expired[1] then
        redis.call('ZREM', KEYS[i], unpack(expired))
        redis.call('ZREM', KEYS[i + 1], unpack(expired))
      end
    end
  end
end

-- Take an entry off the lists from KEYS[first]. One that is damaged must not keep a task alive.
local function delist(first, entry)
  for i = first, #KEYS do
    redis.pcall('ZREM', KEYS[i], entry)
  end
end

-- Read fields of the tasks that entries stand for; 'damaged' in the place of what is no task. No
-- `prefix` of their keys says that they lie elsewhere.
local function read_tasks(entries, prefix, ...)
  local tasks = {}
  for i = 1, prefix ~= '' and #entries or 0 do
    local task = redis.pcall('HMGET', prefix .. string.match(entries[i], ':(.*)$'), ...)
    tasks[i] = task.err and 'damaged' or task
  end
  return tasks
end
