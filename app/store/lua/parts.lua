-- include clock.lua
-- The keys of a session that have other names than its prefix and a word: put before the scripts
-- that ask for it.
--
-- KEYS  none of its own
-- ARGV  none of its own
--
-- Returns nothing: it gives `parts_of(key)`, the keys of the parts that the body `key` is kept in,
-- and `tokens_of(prefix)`, the key of the tokens of the session whose other keys begin so.
--
-- Safe to send twice: it only defines.

local function tokens_of(prefix)
  return 'onboarding:token:' .. string.sub(prefix, #'onboarding:' + 1, -2)
end

local function parts_of(key)
  local body = redis.pcall('HMGET', key, 'transfer', 'parts')
  local names = {}
  -- A body that is damaged, or none, has no parts that anybody could find.
  -- Nor has one that says to have more than there can be: counting them would hold up everybody.
  if not body.err and body[1] and string.find(body[2] or '', '^%d%d?%d?%d?%d?$') then
    for part = 1, tonumber(body[2]) do
      names[part] = key .. ':' .. body[1] .. ':' .. part
    end
  end
  return names
end
