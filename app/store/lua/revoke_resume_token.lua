-- include tokens.lua
-- Revoke a resume token, and the session token that it gave. It is no change and makes no event.
--
-- KEYS  none of its own
-- ARGV  6 id of the token
--
-- Returns {'ok'}, {'resume_token_not_found'}, {'damaged', key} when it cannot be read
--
-- Safe to send twice: see session.lua.

local token = find_resume_token(ARGV[6])
if token == nil then
  return {'resume_token_not_found'}
end
if not token then
  return {'damaged', TOKENS}
end
redis.call('HDEL', TOKENS, 'resume:' .. ARGV[6], 'session:' .. token.gave)
return answer({'ok'})
