-- include clock.lua
-- The index of all sessions: put before the scripts that ask for it.
--
-- KEYS  1 a key of a session or of the index: its name tells whether there are hash tags
-- ARGV  none of its own
--
-- Returns nothing: it gives `feed`, `mark`, and `index_verbs`, which gives `read_entry`, `leave` and
-- `place`.
--
-- Safe to send twice: it only defines, and what it gives may be done again.
--
-- The index lies in one slot. Without hash tags that is the slot of the sessions too, and the script
-- that changes a session changes the index; with them the index follows (store/index.py).
--   entries          hash: session -> what places it; ':created_s' -> the sum of all creations in s;
--                    ':adopted', when sessions from before the index were looked for
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
local FEED = INDEX .. 'feed'
local CREATED_S = ':created_s'

-- Tell everybody what happened to a session, and keep the last 10,000 such events, about: whoever
-- tells often cuts the feed now and then only, for it takes as long as a field or two. An event for
-- others must not fail what it tells of.
local function feed(is_cutting, kind, id, ...)
  if is_cutting then
    redis.pcall('XADD', FEED, 'MAXLEN', '~', '10000', '*', 'type', kind, 'session_id', id, ...)
  else
    redis.pcall('XADD', FEED, '*', 'type', kind, 'session_id', id, ...)
  end
end

-- Count a step that a session saved for the first time, last at `saved`, and the seconds since the step
-- before it was saved last, in buckets of which four double (onboarding/stats.py).
local function count_step(entry, step, saved)
  local funnel = INDEX .. 'funnel:' .. entry.catalogue
  redis.call('HINCRBY', funnel, 'saved:' .. step, 1)
  local before = step > 1 and tonumber(entry.saved_at(step - 1) or nil)
  saved = tonumber(saved or nil)
  if saved and before and saved >= before then
    local bucket = math.floor(4 * math.log((saved - before) / 1000 + 1) / math.log(2))
    redis.call('HINCRBY', funnel, 'gap:' .. (step - 1) .. ':' .. whole(bucket), 1)
  end
end

-- Note that a session saved `steps` for the first time, in the write that it was active with last,
-- where its entry lacks nothing else: says whether that is so.
local function mark(id, entry, ever_before, steps)
  local entries = INDEX .. 'entries'
  local text = redis.call('HGET', entries, id) or ''
  local head = string.match(text,
    '^(' .. entry.created .. ' ' .. entry.class .. ' %d* )' .. ever_before .. ' ')
  if not head then
    return false
  end
  redis.call('HSET', entries, id, head .. entry.ever .. string.sub(text, #head + #ever_before + 1))
  for _, step in ipairs(steps) do
    count_step(entry, step, entry.activity)
  end
  return true
end

-- What finds and changes the places of a session. Made where it is asked for: most writes find the
-- session in its place, and need none of it; nor does a step that is saved for the first time.
local function index_verbs()
  local ENTRIES, DEADLINES = INDEX .. 'entries', INDEX .. 'deadlines'

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
    local moment = string.rep('0', 16 - #entry.created) .. entry.created .. ':' .. id
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
  -- user, activity, deadline, catalogue, and saved_at(step), which gives when a step was saved, in Unix
  -- ms; all but the last are strings.
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
    local ever_before = before and before.ever or ''
    for step = 1, #entry.ever do
      if string.byte(entry.ever, step) == 49 and string.byte(ever_before, step) ~= 49 then
        count_step(entry, step, entry.saved_at(step))
      end
    end
  end

  return read_entry, leave, place
end

