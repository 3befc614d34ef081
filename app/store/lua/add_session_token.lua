-- include tokens.lua
-- Let a session token in, beside those that there are. It is no change and makes no event.
--
-- KEYS  none of its own
-- ARGV  6 digest of the token, 7 how many there may be: the oldest goes
--
-- Returns {'ok'}
--
-- Safe to send twice: see session.lua.

add_session_token(ARGV[6], tonumber(ARGV[7]))
return answer({'ok'})
