-- Take a job out of the queue for good.
--
-- KEYS  1 the queue
-- ARGV  1 consumer group, 2 id of the job
--
-- Returns {'ok'}
--
-- Safe to send twice: what is gone stays gone.

redis.call('XACK', KEYS[1], ARGV[1], ARGV[2])
redis.call('XDEL', KEYS[1], ARGV[2])
return {'ok'}
