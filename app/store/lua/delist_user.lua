-- include index.lua
-- Take places out of the sessions of a user where the index does not have the session as theirs.
--
-- KEYS  1 entries
-- ARGV  1 user, then the places
--
-- Returns {'ok'}
--
-- Safe to send twice: a repeat finds less.

local read_entry = index_verbs()
for i = 2, #ARGV do
  local entry = read_entry(string.match(ARGV[i], '^%d+:(.*)$'))
  if not (entry and entry.user == ARGV[1]) then
    redis.call('ZREM', INDEX .. 'user:' .. ARGV[1], ARGV[i])
  end
end
return {'ok'}
