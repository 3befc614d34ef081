-- Claim the record of an Idempotency-Key that cannot live in the slot of what it is for: the making
-- of a session on a Cluster.
--
-- KEYS  1 the record
-- ARGV  1 fingerprint, 2 session id that the claimant means to make, 3 life of the claim in ms
--
-- Returns {'ok'}, {'replayed', <first answer>}, {'idempotency_mismatch'},
--         {'in_progress'} while somebody else holds a claim, {'damaged', key}
--
-- Safe to send twice: a claim by the same session id is granted again.

local fingerprint, claim = ARGV[1], cjson.encode({'claim', ARGV[2]})
local kept = redis.call('GET', KEYS[1])
if not kept then
  redis.call('SET', KEYS[1], fingerprint .. claim, 'PX', ARGV[3])
  return {'ok'}
end
if not string.find(kept, '^%x+%[') then
  return {'damaged', KEYS[1]}
end
if string.sub(kept, 1, #fingerprint) ~= fingerprint then
  return {'idempotency_mismatch'}
end
local answer = cjson.decode(string.sub(kept, #fingerprint + 1))
if answer[1] ~= 'claim' then
  return {'replayed', answer}
end
if answer[2] == ARGV[2] then
  return {'ok'}
end
return {'in_progress'}
