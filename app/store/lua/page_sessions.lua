-- include room.lua
-- List a page of sessions, the newest first, with what is kept of their progress beside the index, and
-- whose each says itself that it is.
--
-- KEYS  1 entries
-- ARGV  1 place after which to go on ('' = from the newest), 2 how many to list at most, 3 how many
--       to look at at most, 4 statuses as '|pending|error|' ('' = any), 5 workspace ('' = any),
--       6 user ('' = any), 7 how the keys of sessions begin ('' = they lie elsewhere), 8 number of
--       fields of the progress to read, then these, then the sets that together hold all sessions
--
-- Returns {'ok', place of the last one looked at ('' = there are no more), {session, created in Unix
--          ms, class, end of the generation in Unix ms or '', last activity in Unix ms, workspace,
--          user, {value, ...} of the progress or 'damaged', {workspace, user} of the metadata or
--          'damaged'}, ...}
--
-- Safe to send twice: it reads.

local wanted, looked_at = tonumber(ARGV[2]), tonumber(ARGV[3])
local latest = ARGV[1] == '' and '+' or '(' .. ARGV[1]
local moments, is_more = {}, false
local last_field = 8 + tonumber(ARGV[8])
for i = last_field + 1, #ARGV do
  local found = redis.call('ZREVRANGEBYLEX', INDEX .. ARGV[i], latest, '-', 'LIMIT', 0, looked_at)
  is_more = is_more or #found == looked_at
  for _, moment in ipairs(found) do
    moments[#moments + 1] = moment
  end
end
table.sort(moments, function(one, other) return one > other end)

local now_ms = store_time_ms()
local reply = {'ok', ''}
for i, moment in ipairs(moments) do
  if i > looked_at or #reply - 2 == wanted then
    return reply
  end
  reply[2] = moment
  local id = string.match(moment, '^%d+:(.*)$')
  local facts = facts_of(id)
  local status = string.match(facts[3], '^%a+')
  if (ARGV[4] == '' or string.find(ARGV[4], '|' .. status .. '|', 1, true))
    and (ARGV[5] == '' or facts[6] == ARGV[5]) and (ARGV[6] == '' or facts[7] == ARGV[6])
    and tonumber(redis.call('ZSCORE', DEADLINES, id) or 0) > now_ms then
    facts[8], facts[9] = {}, {}
    if ARGV[7] ~= '' then
      local found = redis.pcall('HMGET', ARGV[7] .. id .. ':progress', unpack(ARGV, 9, last_field))
      facts[8] = found.err and 'damaged' or found
      local owner = redis.pcall('HMGET', ARGV[7] .. id .. ':metadata', 'workspace_id', 'user_id')
      facts[9] = owner.err and 'damaged' or owner
    end
    reply[#reply + 1] = facts
  end
end
if not is_more then
  reply[2] = ''
end
return reply
