-- include tokens.lua
-- Revoke a resume token, and the session token that it gave. It is no change and makes no event.
--
-- KEYS  none of its own
-- ARGV  6 id of the token
--
-- Returns {'ok'}, {'not_found'}, {'resume_token_not_found'}, {'damaged', key} when it cannot be read
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
if not tokens then
  return {'damaged', TOKENS}
end
local text = tokens['resume:' .. ARGV[6]]
if not text then
  return {'resume_token_not_found'}
end
local token = parse_resume_token(text)
if not token then
  return {'damaged', TOKENS}
end
redis.call('HDEL', TOKENS, 'resume:' .. ARGV[6], 'session:' .. token.gave)
return answer({'ok'})
