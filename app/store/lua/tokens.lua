-- include session.lua
-- The tokens of a session: put before the scripts that change them.
--
-- KEYS  as session.lua has them
-- ARGV  as session.lua has them
--
-- Returns nothing: it gives `tokens`, field and value of each, nil where they are damaged, and
-- `add_session_token`.
--
-- Safe to send twice: it reads, and defines.
--
-- All tokens of a session lie in one hash, which shares the session's deadline. No token stands
-- there, only the SHA-256 of each:
--   seed              what the maker of the session keeps there of its first session token
--   session:<digest>  when a session token was made, in Unix ms

local found = redis.pcall('HGETALL', TOKENS)
local tokens = not found.err and {} or nil
for i = 1, tokens and #found or 0, 2 do
  tokens[found[i]] = found[i + 1]
end

-- Let a session token in. Where there are `most` already, the oldest goes.
local function add_session_token(digest, most)
  redis.call('HSETNX', TOKENS, 'session:' .. digest, whole(now_ms))
  redis.call('PEXPIREAT', TOKENS, deadline)
  local others = {}
  for field, made in pairs(tokens) do
    if string.find(field, '^session:') and field ~= 'session:' .. digest then
      others[#others + 1] = {field = field, made_ms = tonumber(made) or 0}
    end
  end
  table.sort(others, function(one, other)
    if one.made_ms ~= other.made_ms then
      return one.made_ms < other.made_ms
    end
    return one.field < other.field
  end)
  for i = 1, #others - most + 1 do
    redis.call('HDEL', TOKENS, others[i].field)
  end
end

