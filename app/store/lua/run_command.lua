-- include sending.lua
-- Carry out a command that writes to one key, whatever the key holds.
--
-- KEYS  1 the key
-- ARGV  1 the sending (sending.lua), 2 name of the command, then what follows the key in it
--
-- Returns {'ok'}
--
-- Safe to send twice: only what may be done again is sent so.

redis.call(ARGV[2], KEYS[1], unpack(ARGV, 3))
return {'ok'}
