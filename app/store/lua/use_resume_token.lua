-- include tokens.lua
-- Use a resume token: it lets a session token in, which is the same whenever it is used.
--
-- KEYS  none of its own
-- ARGV  6 id of the token, 7 its digest, 8 digest of the session token that it gives, 9 for how many ms
--       after its first use it may be used again, 10 how many session tokens there may be
--
-- Returns {'ok', metadata, progress} with the hashes as field and value lists,
--         {'resume_token_not_found'} when there is none of this id and digest, its time is over, or it
--         was used longer ago, {'damaged', key} when it cannot be read
--
-- Safe to send twice: see session.lua.

local token = find_resume_token(ARGV[6])
if token == nil then
  return {'resume_token_not_found'}
end
if not token then
  return {'damaged', TOKENS}
end
if token.digest ~= ARGV[7] or not is_open(token, tonumber(ARGV[9])) then
  return {'resume_token_not_found'}
end

if token.used_ms > 0 and tokens['session:' .. ARGV[8]] then
  -- The first answer again: it renews nothing, or it would be another one. What it writes is what is
  -- there, so that replicas can be waited for.
  redis.call('PEXPIREAT', TOKENS, state.deadline)
  return {'ok', redis.call('HGETALL', METADATA), redis.call('HGETALL', PROGRESS)}
end
if token.used_ms == 0 then
  token.used_ms, token.gave = now_ms, ARGV[8]
  keep_resume_token(ARGV[6], token)
end
add_session_token(ARGV[8], tonumber(ARGV[10]))
if moved then
  redis.call('HSET', PROGRESS, 'deadline', deadline)
end
return answer({'ok', redis.call('HGETALL', METADATA), redis.call('HGETALL', PROGRESS)})
