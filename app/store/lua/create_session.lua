-- include erase.lua
-- include session.lua
-- Make a session that is not there yet, with the file that it begins with, if there is one, and
-- where there is room, which may have to be made.
--
-- KEYS  with a file: 5 the upload, from 6 its parts, which are there already
-- ARGV  6 session id, 7 catalogue pin, 8 number of steps, 9 most sessions there may be unless
--       operators have said otherwise (0 = any number; asked only without hash tags),
--       10 'refuse' or 'evict_oldest', 11 digest of a session token ('' = none), 12 seed of it ('' =
--       none), 13 number of values about the file (0 = none), then field and value of each, then field
--       and value of the metadata
--
-- Returns {'ok', session id, created_at in Unix ms, deadline in Unix ms, number of steps, evicted
--          session, ...}, {'exists'}, {'part_lost'} when the file is not whole any more,
--         {'capacity_reached', evicted session, ...} when there are too many for one call to make room
--
-- Safe to send twice: see session.lua.

if state.status then
  return {'exists'}
end

local file_values = tonumber(ARGV[13])
if file_values > 0 then
  for i = 6, #KEYS do
    if redis.call('EXISTS', KEYS[i]) == 0 then
      return {'part_lost'}
    end
  end
end

local evicted = {}
local limit = not IS_TAGGED and room_limit(tonumber(ARGV[9])) or 0
if limit > 0 then
  reclaim(now_ms, 100)
  while count_live(now_ms) >= limit do
    local victim = ARGV[10] == 'evict_oldest' and #evicted < 100 and oldest_session()
    if not victim then
      return {'capacity_reached', unpack(evicted)}
    end
    erase('onboarding:' .. victim .. ':', tonumber(ARGV[8]), at_ms, 'evicted', 'capacity')
    evicted[#evicted + 1] = victim
  end
end

if file_values > 0 then
  redis.call('HSET', KEYS[5], unpack(ARGV, 14, 13 + file_values))
  for i = 6, #KEYS do
    redis.call('HSET', OPS, 'part:' .. KEYS[i], 'kept')
  end
end
redis.call('HSET', METADATA, 'created_at', at_ms, unpack(ARGV, 14 + file_values))
local TOKENS = tokens_of('onboarding:' .. SESSION .. ':')
if ARGV[11] ~= '' then
  redis.call('HSET', TOKENS, 'session:' .. ARGV[11], whole(now_ms))
end
if ARGV[12] ~= '' then
  redis.call('HSET', TOKENS, 'seed', ARGV[12])
end
if not IS_TAGGED and read_entry(ARGV[6]) then
  -- One of the same name has outlived its lifetime unseen.
  unplace(ARGV[6])
  report_end(ARGV[6], 'expired', 'lifetime', at_ms)
end
state.status, state.saved, state.created_at = 'pending', string.rep('0', tonumber(ARGV[8])), at_ms
state.catalogue, state.ever = ARGV[7], state.saved
change('status', 'pending', 'saved', state.saved, 'highest', '0', 'created_at', at_ms,
  'finalized_at', '', 'revision', '0', 'catalogue', ARGV[7], 'ever', state.ever)
record('session_created')
return answer({'ok', ARGV[6], at_ms, deadline, ARGV[8], unpack(evicted)})
