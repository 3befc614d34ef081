-- include room.lua
-- Have the index and the feed follow a session that lies in another slot.
--
-- KEYS  1 entries
-- ARGV  1 session, 2 id of the last event that the feed had when the facts were read ('-' = none, '' =
--       the session was not in the index then),
--       then what read_facts.lua gives: 3 id of the last event that the feed has now, 4 created, 5 class,
--       6 end of the generation or '', 7 marks of the steps that were ever saved, 8 count of changes,
--       9 workspace or '', 10 user or '', 11 last activity, 12 deadline, 13 catalogue pin, 14 number of
--       steps, from 15 when each was saved or '', all times in Unix ms; then for each event the number
--       of its values, then field and value of each
--
-- Returns {'ok'}, {'superseded'} when somebody else has followed the session meanwhile
--
-- Safe to send twice: a repeat finds that the feed is further than the facts that it carries.

local id = ARGV[1]
if redis.call('SISMEMBER', INDEX .. 'condemned', id) == 1 then
  -- It has lost its room, and is about to be removed.
  return {'ok'}
end
local before = read_entry(id)
if not before and ARGV[2] ~= '' then
  -- It was taken out since the facts were read, because it is gone: they would bring it back.
  return {'superseded'}
end
if before and before.changes ~= '0' and before.created ~= ARGV[4] then
  -- One of the same name has outlived its lifetime unseen.
  unplace(id)
  report_end(id, 'expired', 'lifetime', ARGV[4])
  before = nil
end
if before and (before.fed ~= ARGV[2] or tonumber(before.changes) > tonumber(ARGV[8])) then
  return {'superseded'}
end
local steps = tonumber(ARGV[14])
place(id, {
  created = ARGV[4], class = ARGV[5], ended = ARGV[6], ever = ARGV[7], changes = ARGV[8],
  fed = ARGV[3], workspace = ARGV[9], user = ARGV[10], activity = ARGV[11], deadline = ARGV[12],
  catalogue = ARGV[13],
  saved_at = function(step) return ARGV[14 + step] end,
})
local at = 15 + steps
while ARGV[at] do
  local values = tonumber(ARGV[at])
  local kind, others = nil, {}
  for i = at + 1, at + values, 2 do
    if ARGV[i] == 'type' then
      kind = ARGV[i + 1]
    else
      others[#others + 1], others[#others + 2] = ARGV[i], ARGV[i + 1]
    end
  end
  feed(true, kind, id, unpack(others))
  at = at + values + 1
end
return {'ok'}
