-- Write something that nobody reads, so that WAIT on the same connection vouches for all before it.
--
-- KEYS  1 the mark
-- ARGV  1 its life in ms
--
-- Returns {'ok'}
--
-- Safe to send twice: it means nothing. A full store takes it too, since it does not begin with SET.

if redis.call('PEXPIRE', KEYS[1], ARGV[1]) == 0 then
  redis.call('SET', KEYS[1], '', 'PX', ARGV[1])
end
return {'ok'}
