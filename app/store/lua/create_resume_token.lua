-- include tokens.lua
-- Keep a resume token, and forget those that were not used in time. It is no change and makes no
-- event.
--
-- KEYS  none of its own
-- ARGV  6 id of the token, 7 its digest, 8 its life in ms, 9 how many may wait to be used,
--       10 how many are remembered: the one goes that was used first, with the session token that it
--       gave, 11 its label ('' = none)
--
-- Returns {'ok', end of its time in Unix ms}, {'too_many'} when so many wait to be used,
--         {'damaged', key} when one of them cannot be read
--
-- Safe to send twice: see session.lua.

local waiting, used, over = 0, {}, {}
for field, text in pairs(tokens) do
  if string.find(field, '^resume:') then
    local token = parse_resume_token(text)
    if not token then
      return {'damaged', TOKENS}
    end
    if token.used_ms > 0 then
      used[#used + 1] = {field = field, used_ms = token.used_ms, gave = token.gave}
    elseif token.ends_ms > now_ms then
      waiting = waiting + 1
    else
      over[#over + 1] = field
    end
  end
end
if waiting >= tonumber(ARGV[9]) then
  return {'too_many'}
end

local ends_ms = now_ms + tonumber(ARGV[8])
keep_resume_token(ARGV[6], {digest = ARGV[7], made = at_ms, ends_ms = ends_ms, used_ms = 0,
  gave = '-', label = ARGV[11]})
table.sort(used, function(one, other) return one.used_ms < other.used_ms end)
for i = 1, math.min(#used, waiting + #used + 1 - tonumber(ARGV[10])) do
  -- What can be revoked no more must not open the session any longer.
  over[#over + 1] = used[i].field
  over[#over + 1] = 'session:' .. used[i].gave
end
if #over > 0 then
  redis.call('HDEL', TOKENS, unpack(over))
end
return answer({'ok', whole(ends_ms)})
