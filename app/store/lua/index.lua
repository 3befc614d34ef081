-- include parts.lua
-- The index of all sessions: put before the scripts whose first line asks for it.
--
-- KEYS  1 a key of a session or of the index: its name tells whether there are hash tags
-- ARGV  none of its own
--
-- Returns nothing: it gives `feed`, `report_end`, `read_entry`, `place`, `unplace`,
--         `facts_of`, `count_live`, `room_limit`, `cleanup_interval_ms`, `oldest_session`, `reclaim`.
--
-- Safe to send twice: it only defines, and what it gives may be done again.
--
-- The index lies in one slot. Without hash tags that is the slot of the sessions too, and the script
-- that changes a session changes the index; with them the index follows (store/index.py).
--   entries          hash: session -> what places it; ':created_s' -> the sum of all creations in s
--   deadlines        zset by the end of the lifetime in Unix ms
--   activity:<class> zset by the last accepted write in Unix ms
--   ended:<class>    zset by the end of the generation in Unix ms
--   created:<class>, workspace:<id>, user:<id>
--                    zset of '<creation in ms>:<session>' in the order of the alphabet, so that a page
--                    goes on exactly where the one before it ended, whatever came and went meanwhile
--   funnel:<pin>     hash of a catalogue: 'saved:<step>', 'gap:<step>:<bucket>' -> count
--   feed             stream of every event of every session
--   cleanup, config  hashes: what was cleaned up so far, what operators have set
--   lease            string: who sweeps
--   condemned        set of sessions that were evicted, while there are hash tags
-- A class is <status>:held for a session with answers that were never exported, else <status>:free.

local IS_TAGGED = string.find(KEYS[1], '{', 1, true) ~= nil
local INDEX = IS_TAGGED and 'onboarding:index:{sessions}:' or 'onboarding:index:sessions:'
local ENTRIES, DEADLINES, FEED = INDEX .. 'entries', INDEX .. 'deadlines', INDEX .. 'feed'
local CREATED_S = ':created_s'
local FEED_KEPT = 10000
local CLASSES = {'pending:free', 'pending:held', 'processing:free', 'processing:held',
  'complete:free', 'complete:held', 'error:free', 'error:held'}

local function feed(kind, id, ...)
  -- An event for others must not fail what it tells of.
  redis.pcall('XADD', FEED, 'MAXLEN', '~', FEED_KEPT, '*', 'type', kind, 'session_id', id, ...)
end

local TALLIES = {lifetime = 'expired', rule = 'removed', cleanup = 'removed', capacity = 'evicted'}

-- Tell the feed of the end of a session, and count it.
local function report_end(id, kind, reason, at_ms)
  feed(kind, id, 'at', at_ms, 'reason', reason)
  if TALLIES[reason] then
    redis.pcall('HINCRBY', INDEX .. 'cleanup', TALLIES[reason], 1)
  end
end

local function read_entry(id)
  local text = redis.call('HGET', ENTRIES, id)
  if not text then
    return nil
  end
  local created, class, ended, ever, changes, fed, workspace, user =
    string.match(text, '^(%d+) (%a+:%a+) (%d*) ([01]*) (%d+) (%S*)\n(.-)\n(.*)$')
  return created and {created = created, class = class, ended = ended, ever = ever,
    changes = changes, fed = fed, workspace = workspace, user = user}
end

-- The sorted sets that an entry stands in: name, member, score. An activity that is not known is
-- none that matters.
local function places_of(id, entry)
  local moment = string.rep('0', 14 - #entry.created) .. entry.created .. ':' .. id
  local places = {
    {'created:' .. entry.class, moment, '0'}, {'activity:' .. entry.class, id, entry.activity},
  }
  if entry.ended ~= '' then
    places[#places + 1] = {'ended:' .. entry.class, id, entry.ended}
  end
  if entry.workspace ~= '' then
    places[#places + 1] = {'workspace:' .. entry.workspace, moment, '0'}
  end
  if entry.user ~= '' then
    places[#places + 1] = {'user:' .. entry.user, moment, '0'}
  end
  return places
end

-- Count each step that a session saved for the first time, and the seconds since the step before it
-- was saved last, in buckets of which four double (onboarding/stats.py).
local function count_funnel(entry, ever_before)
  local funnel = INDEX .. 'funnel:' .. entry.catalogue
  for step = 1, #entry.ever do
    local is_new = string.sub(entry.ever, step, step) == '1'
      and string.sub(ever_before, step, step) ~= '1'
    if is_new then
      redis.call('HINCRBY', funnel, 'saved:' .. step, 1)
      local saved = tonumber(entry.saved_at(step) or nil)
      local before = step > 1 and tonumber(entry.saved_at(step - 1) or nil)
      if saved and before and saved >= before then
        local bucket = math.floor(4 * math.log((saved - before) / 1000 + 1) / math.log(2))
        redis.call('HINCRBY', funnel, 'gap:' .. (step - 1) .. ':' .. string.format('%d', bucket), 1)
      end
    end
  end
end

local function leave(id, entry)
  for _, place in ipairs(places_of(id, entry)) do
    redis.call('ZREM', INDEX .. place[1], place[2])
  end
end

-- The steps that are marked in one or the other.
local function marks_of_both(one, other)
  if one == other or other == '' then
    return one
  end
  local both = {}
  for step = 1, math.max(#one, #other) do
    both[step] = (string.byte(one, step) == 49 or string.byte(other, step) == 49) and '1' or '0'
  end
  return table.concat(both)
end

-- Put a session where it belongs. `entry` holds created, class, ended, ever, changes, fed, workspace,
-- user, activity, deadline, catalogue, and saved_at(step) in Unix ms; all but the last are strings.
-- `is_there` tells that it stands in the set of its class, and so in the others too unless something
-- else than its class has changed.
local function place(id, entry, is_there)
  local before = read_entry(id)
  if before then
    entry.ever = marks_of_both(entry.ever, before.ever)
  else
    redis.call('HINCRBY', ENTRIES, CREATED_S, string.format('%d', entry.created / 1000))
  end
  local stays = is_there and before and before.class == entry.class and before.ended == entry.ended
    and before.workspace == entry.workspace and before.user == entry.user
  if not stays then
    if before then
      leave(id, before)
    end
    for _, each in ipairs(places_of(id, entry)) do
      redis.call('ZADD', INDEX .. each[1], each[3], each[2])
    end
  end
  redis.call('ZADD', DEADLINES, entry.deadline, id)
  redis.call('HSET', ENTRIES, id, table.concat({entry.created, entry.class, entry.ended, entry.ever,
    entry.changes, entry.fed}, ' ') .. '\n' .. entry.workspace .. '\n' .. entry.user)
  count_funnel(entry, before and before.ever or '')
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
      local first = redis.call('ZRANGE', INDEX .. 'activity:' .. class, 0, 0, 'WITHSCORES')
      if first[1] and not (since and since <= tonumber(first[2])) then
        oldest, since = first[1], tonumber(first[2])
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

