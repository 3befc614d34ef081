-- include session.lua
-- The tokens of a session: put before the scripts that change them.
--
-- KEYS  as session.lua has them
-- ARGV  as session.lua has them
--
-- Returns before the script begins: {'not_found'}; {'damaged', key} when there is no telling which
-- tokens there are. It gives `tokens`, field and value of each, `add_session_token`, and what finds,
-- reads and writes the record of a resume token.
--
-- Safe to send twice: it reads, and defines.
--
-- All tokens of a session lie in one hash, which shares the session's deadline. No token stands
-- there, only the SHA-256 of each:
--   seed              what the maker of the session keeps there of its first session token
--   session:<digest>  when a session token was made, in Unix ms
--   resume:<id>       a resume token: its digest, when it was made, when its time is over, when it was
--                     used first (0 = not yet), all in Unix ms, the digest of the session token that it
--                     gave ('-' = none yet), its label

if not state.status then
  return {'not_found'}
end
local TOKENS = tokens_of('onboarding:' .. SESSION .. ':')
local found = redis.pcall('HGETALL', TOKENS)
if found.err then
  return {'damaged', TOKENS}
end
local tokens = {}
for i = 1, #found, 2 do
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

-- Read the record of a resume token; nil for what is none.
local function parse_resume_token(text)
  local digest, made, ends, used, gave, label =
    string.match(text, '^(%x+) (%d+) (%d+) (%d+) (%S+) (.*)$')
  return digest and {digest = digest, made = made, ends_ms = tonumber(ends),
    used_ms = tonumber(used), gave = gave, label = label}
end

-- Find a resume token: nil when there is none, false when it cannot be read.
local function find_resume_token(id)
  local text = tokens['resume:' .. id]
  if text then
    return parse_resume_token(text) or false
  end
end

local function keep_resume_token(id, token)
  redis.call('HSET', TOKENS, 'resume:' .. id, table.concat({token.digest, token.made,
    whole(token.ends_ms), whole(token.used_ms), token.gave, token.label}, ' '))
  redis.call('PEXPIREAT', TOKENS, deadline)
end

-- Whether a token may be used: once, and for `repeat_ms` after that again.
local function is_open(token, repeat_ms)
  if token.used_ms == 0 then
    return token.ends_ms > now_ms
  end
  return now_ms - token.used_ms <= repeat_ms
end

