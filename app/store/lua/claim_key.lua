-- include sending.lua
-- Claim the record of an Idempotency-Key that cannot live in the slot of what it is for: the making
-- of a session on a Cluster.
--
-- KEYS  1 the record
-- ARGV  1 the sending (sending.lua), 2 fingerprint, 3 session id that the claimant means to make, 4 how
--       long nobody else may take the claim over, in ms, 5 life of the record in ms, 6 session id of a
--       claim that came to nothing and is to be taken over ('' = none)
--
-- Returns {'ok'}, {'replayed', <first answer>}, {'idempotency_mismatch'},
--         {'claimed', session id, '1' or ''} while somebody else holds a claim, '1' when it may be
--         taken over, {'damaged', key}
--
-- Safe to send twice: a claim by the same session id is granted again.

local fingerprint = ARGV[2]
local kept = redis.call('GET', KEYS[1])
if kept then
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
  if answer[2] == ARGV[3] then
    return {'ok'}
  end
  -- One without a time is of an older process, and ends by itself.
  local is_over = answer[3] and tonumber(answer[3]) <= now_ms
  if not (is_over and answer[2] == ARGV[6]) then
    return {'claimed', answer[2], is_over and '1' or ''}
  end
end
local claim = {'claim', ARGV[3], whole(now_ms + tonumber(ARGV[4]))}
redis.call('SET', KEYS[1], fingerprint .. cjson.encode(claim), 'PX', ARGV[5])
return {'ok'}
