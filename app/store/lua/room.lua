-- include index.lua
-- How many sessions there are and may be, and which go first: put before the scripts that ask for it.
--
-- KEYS  as index.lua
-- ARGV  none of its own
--
-- Returns nothing: it gives `CLASSES`, `report_end`, `unplace`, `facts_of`, `count_live`,
--         `room_limit`, `cleanup_interval_ms`, `oldest_session` and `reclaim`.
--
-- Safe to send twice: it only defines, and what it gives may be done again.

local ENTRIES, DEADLINES = INDEX .. 'entries', INDEX .. 'deadlines'
local read_entry, leave, place = index_verbs()

local CLASSES = {'pending:free', 'pending:held', 'processing:free', 'processing:held',
  'complete:free', 'complete:held', 'error:free', 'error:held'}
local TALLIES = {lifetime = 'expired', rule = 'removed', cleanup = 'removed', capacity = 'evicted'}

-- Tell the feed of the end of a session, and count it.
local function report_end(id, kind, reason, at_ms)
  feed(true, kind, id, 'at', at_ms, 'reason', reason)
  if TALLIES[reason] then
    redis.pcall('HINCRBY', INDEX .. 'cleanup', TALLIES[reason], 1)
  end
end

-- Take a session out; says whether it was in.
local function unplace(id)
  local entry = read_entry(id)
  if entry then
    leave(id, entry)
    redis.call('HINCRBY', ENTRIES, CREATED_S, string.format('-%d', entry.created / 1000))
  else
    -- Nobody knows where else it stands, but this is where it would be chosen for removal for ever.
    for _, class in ipairs(CLASSES) do
      redis.call('ZREM', INDEX .. 'activity:' .. class, id)
    end
  end
  redis.call('HDEL', ENTRIES, id)
  return redis.call('ZREM', DEADLINES, id) == 1 or entry ~= nil
end

-- What is known of a session without looking at it: as list_due.lua and page_sessions.lua give it.
local function facts_of(id)
  local entry = read_entry(id)
  if not entry then
    return {id, '0', 'pending:held', '', '0', '', ''}
  end
  local activity = redis.call('ZSCORE', INDEX .. 'activity:' .. entry.class, id)
  return {id, entry.created, entry.class, entry.ended, activity or entry.created, entry.workspace,
    entry.user}
end

local function count_live(now_ms)
  return redis.call('ZCOUNT', DEADLINES, '(' .. whole(now_ms), '+inf')
end

-- How many sessions there may be; 0 = any number. What operators have set outweighs the default.
local function room_limit(default)
  return tonumber(redis.call('HGET', INDEX .. 'config', 'max_sessions') or nil) or default
end

local function cleanup_interval_ms(default)
  local set_s = tonumber(redis.call('HGET', INDEX .. 'config', 'cleanup_interval_s') or nil)
  return set_s and set_s * 1000 or default
end

-- The session to lose first: of those that ended and have no answers that were never exported, else
-- of all, the one with the oldest activity.
local function oldest_session()
  for _, classes in ipairs({{'complete:free', 'error:free'}, CLASSES}) do
    local oldest, since
    for _, class in ipairs(classes) do
      local found = redis.call('ZRANGE', INDEX .. 'activity:' .. class, 0, IS_TAGGED and 99 or 0,
        'WITHSCORES')
      for i = 1, #found, 2 do
        -- One that is about to be made in another slot would be made all the same.
        local entry = IS_TAGGED and class == 'pending:free' and read_entry(found[i])
        if not (entry and entry.changes == '0') then
          if not (since and since <= tonumber(found[i + 1])) then
            oldest, since = found[i], tonumber(found[i + 1])
          end
          break
        end
      end
    end
    if oldest then
      return oldest
    end
  end
  return nil
end

-- Take out up to `most` sessions whose lifetime is over. Only without hash tags.
local function reclaim(now_ms, most)
  local past = redis.call('ZRANGEBYSCORE', DEADLINES, '-inf', whole(now_ms),
    'WITHSCORES', 'LIMIT', 0, most)
  for i = 1, #past, 2 do
    local id = past[i]
    local deadline = redis.pcall('HGET', 'onboarding:' .. id .. ':progress', 'deadline')
    if type(deadline) == 'string' and tonumber(deadline) and tonumber(deadline) > now_ms then
      redis.call('ZADD', DEADLINES, deadline, id)
    elseif unplace(id) then
      report_end(id, 'expired', 'lifetime', past[i + 1])
    end
  end
  return #past / 2
end

