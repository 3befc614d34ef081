-- Look up the first answer to an Idempotency-Key.
--
-- KEYS  1 the record
-- ARGV  1 fingerprint of the request
--
-- Returns {'replayed', <first answer>}, {'idempotency_mismatch'}, {'unknown'}, {'damaged', key}
--
-- Safe to send twice: it reads.

local kept = redis.call('GET', KEYS[1])
if not kept then
  return {'unknown'}
end
if not string.find(kept, '^%x+%[') then
  return {'damaged', KEYS[1]}
end
if string.sub(kept, 1, #ARGV[1]) ~= ARGV[1] then
  return {'idempotency_mismatch'}
end
return {'replayed', cjson.decode(string.sub(kept, #ARGV[1] + 1))}
