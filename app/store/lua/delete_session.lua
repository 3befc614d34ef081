-- include sending.lua
-- include erase.lua
-- Remove every key of a session, if it is as the caller takes it to be.
--
-- KEYS  1 metadata, 2 progress, 3 events, 4 ops
-- ARGV  1 the sending (sending.lua), 2 attempt (1 = first), 3 number of steps to look for at least,
--       4 the caller's time in Unix ms, 5 type and 6 reason of what the feed says,
--       7 statuses it may have as '|complete|error|' ('' = any),
--       8 field of a time in Unix ms ('' = none), 9 the latest that this may be,
--       10 '1' = spare answers that were never exported, 11 the user whose it must be ('' = anybody's)
--
-- Returns {'ok'}, {'not_found'}, {'spared'} when it is not, or cannot be told
--
-- Safe to send twice: the memory of operations goes with the session, so a repeat (attempt 2 and
-- later) that finds nothing takes it that an earlier sending did the work.

local prefix = string.sub(KEYS[2], 1, -#'progress' - 1)
if ARGV[7] ~= '' or ARGV[8] ~= '' or ARGV[10] == '1' then
  local state = redis.pcall('HMGET', KEYS[2], 'status', 'saved', 'held', 'finalized_at',
    'updated_at', 'active_at', ARGV[8])
  if state.err or not state[1] or not state[2] then
    if not state.err and redis.call('EXISTS', KEYS[1], KEYS[2]) == 0 then
      return tonumber(ARGV[2]) > 1 and {'ok'} or {'not_found'}
    end
    return {'spared'}
  end
  if ARGV[7] ~= '' and not string.find(ARGV[7], '|' .. state[1] .. '|', 1, true) then
    return {'spared'}
  end
  local moment = tonumber(state[7] or nil)
  if ARGV[8] == 'updated_at' then
    moment = math.max(moment or 0, tonumber(state[6] or nil) or 0)
  end
  if ARGV[8] ~= '' and not (moment and moment <= tonumber(ARGV[9])) then
    return {'spared'}
  end
  if ARGV[10] == '1' then
    if string.find(state[2], '1', 1, true) and state[3] ~= '0' then
      return {'spared'}
    end
    -- What is being typed is an answer too, until the steps are locked.
    for step = 1, state[4] == '' and #state[2] or 0 do
      if redis.call('EXISTS', prefix .. 'draft:' .. step) == 1 then
        return {'spared'}
      end
    end
  end
end

if ARGV[11] ~= '' then
  local user = redis.pcall('HGET', KEYS[1], 'user_id')
  local is_of_nobody = not user and redis.call('EXISTS', KEYS[1]) == 1
  -- Metadata that are damaged or lost do not say that it is somebody else's.
  if is_of_nobody or (type(user) == 'string' and user ~= ARGV[11]) then
    return {'spared'}
  end
end

local removed = erase(prefix, tonumber(ARGV[3]), ARGV[4], ARGV[5], ARGV[6])
if removed == 0 and tonumber(ARGV[2]) == 1 then
  return {'not_found'}
end
return {'ok'}
