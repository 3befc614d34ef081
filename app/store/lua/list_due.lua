-- include room.lua
-- List sessions of one class, the oldest first, up to a moment.
--
-- KEYS  1 entries
-- ARGV  1 order: 'created', 'activity' or 'ended', 2 class, 3 the latest moment in Unix ms,
--       4 how many to skip, 5 how many to list at most
--
-- Returns {'ok', {session, created in Unix ms, class, end of the generation in Unix ms or '',
--          last activity in Unix ms, workspace, user}, ...}
--
-- Safe to send twice: it reads.

local set, found = INDEX .. ARGV[1] .. ':' .. ARGV[2], nil
if ARGV[1] == 'created' then
  -- ';' follows ':' in the alphabet.
  local latest = '(' .. string.rep('0', 16 - #ARGV[3]) .. ARGV[3] .. ';'
  found = redis.call('ZRANGEBYLEX', set, '-', latest, 'LIMIT', ARGV[4], ARGV[5])
else
  found = redis.call('ZRANGEBYSCORE', set, '-inf', ARGV[3], 'LIMIT', ARGV[4], ARGV[5])
end
local reply = {'ok'}
for _, member in ipairs(found) do
  local id = member
  if ARGV[1] == 'created' then
    id = string.match(member, '^%d+:(.*)$')
  end
  reply[#reply + 1] = facts_of(id)
end
return reply
