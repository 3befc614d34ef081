-- include sending.lua
-- include parts.lua
-- include index.lua
-- The opening of every script that changes a session: put before those that ask for it.
--
-- It reads the clock and the session's state, recognises what was sent before, and gives the script
-- its verbs: `change`, `record`, `place_anew`, `answer`. Of the steps whose keys the script names it
-- gives `versions`, in their order, false for one that was never saved.
--
-- KEYS  1 metadata, 2 progress, 3 events, 4 ops, from 5 the script's own;
--       the record of the Idempotency-Key comes last, when there is one
-- ARGV  1 the sending (sending.lua), 2 operation id, 3 lifetime in ms, 4 the caller's time in Unix ms,
--       5 fingerprint of the request ('' = no Idempotency-Key), from 6 the script's own
--
-- Returns before the script begins: the first answer, when the operation id is remembered;
-- {'replayed', <first answer>} or {'idempotency_mismatch'}, when the Idempotency-Key is;
-- {'damaged', key}, when the session's state or that record cannot be read.
--
-- Safe to send twice: an operation is remembered for 120 s at least by Redis' own clock, however
-- many others write, and a repeat is answered from memory before anything is looked at or changed. One
-- that comes later than its sender waits does nothing, whatever has been forgotten or removed by then.
--
-- The keys of a session that a script does not name (all steps, when the lifetime moves on) are
-- derived from the name of `progress`: they share the session's id and, under a hash tag, its slot.

local METADATA, PROGRESS, EVENTS, OPS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local SESSION = string.sub(PROGRESS, #'onboarding:' + 1, -#':progress' - 1)
local operation, lifetime_ms, at_ms, fingerprint = ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]

local MEMORY_MS = 120000
-- All keys share one deadline, rounded up to 1/168 of the lifetime (an hour of seven days): only
-- the write that crosses into the next step touches the keys of every other step.
local DEADLINE_STEPS = 168

-- The memory of a session, in `ops`:
--   <turn>:<operation>  its reply, a turn being 120 s long; looked up in this turn and the one before
--   turn                the turn in which older ones were forgotten last
--   event:<given>       id of the event that a sender gave this id
--   key:<key>           a record of an Idempotency-Key, and its end in Unix ms
--   part:<key>          a part of a body, and until when that may be on its way in Unix ms, or 'kept'
local turn = math.floor(now_ms / MEMORY_MS)
local this_turn = whole(turn)
local memory = redis.call('HMGET', OPS,
  this_turn .. ':' .. operation, whole(turn - 1) .. ':' .. operation, 'turn')
if memory[1] or memory[2] then
  return cjson.decode(memory[1] or memory[2])
end

local idempotency = fingerprint ~= '' and KEYS[#KEYS]
if idempotency then
  local kept = redis.call('GET', idempotency)
  if kept then
    if not string.find(kept, '^%x+%[') then
      return {'damaged', idempotency}
    end
    if string.sub(kept, 1, #fingerprint) ~= fingerprint then
      return {'idempotency_mismatch'}
    end
    return {'replayed', cjson.decode(string.sub(kept, #fingerprint + 1))}
  end
end

-- The versions of steps come with the state: to ask takes longer than to read.
local versions = {}
local at_name = #PROGRESS - #'progress' + 1
for i = 5, #KEYS do
  local step = string.match(KEYS[i], '^step:(%d+)$', at_name)
  if step then
    versions[#versions + 1] = 'v' .. step
  end
end
local found = redis.call('HMGET', PROGRESS, 'status', 'saved', 'highest', 'created_at', 'updated_at',
  'deadline', 'finalized_at', 'revision', 'changes', 'catalogue', 'held', 'ever', unpack(versions))
for i = 1, #versions do
  versions[i] = found[12 + i]
end
-- `held` is '0' when every answer is in an export, `ever` marks the steps that were ever saved. A
-- script that lets a generation end or begin sets `ended_at`, when it ended, '' before that.
local state
do
  local status, saved, highest, created_at, updated_at, ends_at, finalized_at, revision, changes,
    catalogue, held, ever = unpack(found)
  state = {status = status, saved = saved, highest = highest, created_at = created_at,
    updated_at = updated_at, deadline = ends_at, finalized_at = finalized_at, revision = revision,
    changes = changes, catalogue = catalogue, held = held, ever = ever}

  -- A session that is there without all of its state is damage, which must not pass for absence.
  if status then
    local is_known = status == 'pending' or status == 'processing' or status == 'complete'
      or status == 'error'
    local is_whole = saved and highest and created_at and updated_at and ends_at and finalized_at
      and revision and changes and catalogue and catalogue ~= ''
    -- One look at all numbers together: it costs little more than that at each.
    if not (is_known and is_whole and string.find(saved .. ' ' .. highest .. ' ' .. created_at .. ' '
      .. updated_at .. ' ' .. ends_at .. ' ' .. finalized_at .. ' ' .. revision .. ' ' .. changes,
      '^[01]+ %d+ %d+ %d+ %d+ %d* %d+ %d+$')) then
      return {'damaged', PROGRESS}
    end
  elseif redis.call('EXISTS', PROGRESS, METADATA) > 0 then
    return {'damaged', PROGRESS}
  end
end
-- A log that is none fails here, before anything is written, and not after.
local events = redis.call('XLEN', EVENTS)

-- A log or a memory that was lost is begun anew, and must not live for ever.
local deadline, deadline_ms = state.deadline, tonumber(state.deadline or 0)
local moved = now_ms + lifetime_ms > deadline_ms or events == 0 or not memory[3]
if moved then
  local step_ms = math.max(1, math.floor(lifetime_ms / DEADLINE_STEPS))
  deadline_ms = math.max(deadline_ms, math.ceil((now_ms + lifetime_ms) / step_ms) * step_ms)
  deadline = whole(deadline_ms)
end

-- What the script has done so far, and what has become of the session's place in the index. In one
-- table: each variable that functions share takes as long to make as a table.
local done = {changed = false, recorded = false, placed = true}

-- A script that changes the status, the saved steps, or what says whether they are in an export,
-- says so in `state` too: by these the session has its place in the index.
local function change(...)
  done.changed = true
  state.updated_at = at_ms
  state.changes = whole((state.changes or 0) + 1)
  redis.call('HSET', PROGRESS, 'updated_at', at_ms, 'changes', state.changes, ...)
end

local function record(kind, ...)
  done.recorded = true
  if not IS_TAGGED then
    -- One operation in 16, by the last digit of its id, which is random.
    feed(string.byte(operation, -1) == 48, kind, SESSION, 'at', at_ms, ...)
  end
  return redis.call('XADD', EVENTS, '*', 'type', kind, 'at', at_ms, ...)
end

-- Say that the session's entry in the index is not what it was, although its class may be: `steps`
-- were saved for the first time, those before them are marked in `ever_before`, or, without these,
-- anything may have changed.
local function place_anew(steps, ever_before)
  done.placed, done.first_saved, done.ever_before = false, steps, ever_before
end

-- Keep the session's place in the index, where that lies beside it. Nearly every write finds the
-- session in the set of its class; one that does not has changed the class, or heals the index.
local function keep_place()
  local is_held = state.held ~= '0' and string.find(state.saved, '1', 1, true)
  local class = state.status .. (is_held and ':held' or ':free')
  local is_there = redis.call('ZADD', INDEX .. 'activity:' .. class, at_ms, SESSION) == 0
  local is_settled = is_there and (done.placed or done.first_saved)
  if is_settled and moved then
    redis.call('ZADD', INDEX .. 'deadlines', deadline, SESSION)
  end
  if is_settled and done.placed then
    return
  end
  local entry = {
    created = state.created_at, class = class, ever = state.ever or '', changes = state.changes or '0',
    fed = '-', activity = at_ms, deadline = deadline, catalogue = state.catalogue,
    saved_at = function(step) return redis.call('HGET', PROGRESS, 's' .. step) end,
  }
  if not (is_settled and mark(SESSION, entry, done.ever_before, done.first_saved)) then
    local owner = redis.pcall('HMGET', METADATA, 'workspace_id', 'user_id')
    entry.workspace, entry.user = owner[1] or '', owner[2] or ''
    entry.ended = state.ended_at or redis.call('HGET', PROGRESS, 'ended_at') or ''
    local _, _, place = index_verbs()
    place(SESSION, entry, is_there)
  end
end

-- Forget operations of older turns, records that have had their time, parts of bodies that were
-- never finished, and the ids that senders gave to events which are in the log no more.
local function forget_older_turns()
  local stale = {}
  local fields = redis.call('HGETALL', OPS)
  local oldest = redis.call('XRANGE', EVENTS, '-', '+', 'COUNT', 1)[1]
  local oldest_ms = oldest and tonumber(string.match(oldest[1], '^%d+')) or 0
  for i = 1, #fields, 2 do
    local name, value = fields[i], fields[i + 1]
    local of = tonumber(string.match(name, '^(%d+):'))
    local kind = string.match(name, '^(%a+):')
    local is_stale = of and of < turn - 1
    if kind == 'key' or kind == 'part' then
      is_stale = (tonumber(value) or now_ms) < now_ms
    elseif kind == 'event' then
      is_stale = tonumber(string.match(value, '^%d+')) < oldest_ms
    end
    if is_stale then
      stale[#stale + 1] = name
      if kind == 'part' then
        redis.call('DEL', string.sub(name, 6))
      end
    end
  end
  for i = 1, #stale, 500 do
    redis.call('HDEL', OPS, unpack(stale, i, math.min(i + 499, #stale)))
  end
end

local function move_deadline()
  local prefix = string.sub(PROGRESS, 1, -#'progress' - 1)
  redis.call('HSET', PROGRESS, 'deadline', deadline)
  for _, name in ipairs({'metadata', 'progress', 'events', 'ops', 'export', 'history', 'result',
    'upload'}) do
    redis.call('PEXPIREAT', prefix .. name, deadline)
  end
  redis.call('PEXPIREAT', tokens_of(prefix), deadline)
  for _, body in ipairs({'result', 'upload'}) do
    for _, part in ipairs(parts_of(prefix .. body)) do
      redis.call('PEXPIREAT', part, deadline)
    end
  end
  for step = 1, #state.saved do
    if string.byte(state.saved, step) == 49 then -- '1'
      redis.call('PEXPIREAT', prefix .. 'step:' .. step, deadline)
    end
  end
  local fields = redis.call('HGETALL', OPS)
  for i = 1, #fields, 2 do
    local kind, key = string.match(fields[i], '^(%a+):(.*)$')
    if kind == 'key' then
      -- A record that had to end with the session lives on with it, up to its own end.
      redis.call('PEXPIREAT', key, whole(math.min(tonumber(fields[i + 1]), deadline_ms)))
    elseif kind == 'part' then
      redis.call('PEXPIREAT', key, deadline)
    end
  end
end

-- Remember the reply and return it. `kept` is what the Idempotency-Key answers, if not the reply,
-- `text` the reply as JSON, where the script knows a cheaper way to write it.
local function answer(reply, kept, text)
  redis.call('HSET', OPS, this_turn .. ':' .. operation, text or cjson.encode(reply))
  if idempotency then
    local IDEMPOTENCY_MS = 86400000
    local end_ms = now_ms + IDEMPOTENCY_MS
    redis.call('SET', idempotency, fingerprint .. cjson.encode(kept or reply), 'PXAT',
      whole(math.min(end_ms, deadline_ms)))
    redis.call('HSET', OPS, 'key:' .. idempotency, whole(end_ms))
  end
  if memory[3] ~= this_turn then
    redis.call('HSET', OPS, 'turn', this_turn)
    forget_older_turns()
  end
  if not done.changed then
    -- A write all the same, of which nobody sees anything but that somebody is there.
    redis.call('HSET', PROGRESS, 'active_at', at_ms)
  end
  if moved then
    move_deadline()
  end
  if not IS_TAGGED then
    -- The index is a hint: a write must not fail because of it, and has been done already.
    pcall(keep_place)
  end
  if done.recorded then
    local EVENTS_KEPT = 1000
    -- Cut where a cut takes something away: a stream is cut by the hundred.
    if events >= EVENTS_KEPT + 100 then
      redis.call('XTRIM', EVENTS, 'MAXLEN', '~', EVENTS_KEPT)
    end
    -- Tells who follows the session to look at its log. A write must not fail because the store
    -- lets nobody publish.
    redis.pcall('PUBLISH', EVENTS, 'recorded')
  end
  return reply
end

