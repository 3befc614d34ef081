-- include session.lua
-- Save the answers of one or several steps, all or none, and drop their drafts.
--
-- KEYS  from 5 for each step: its key, its draft's key
-- ARGV  6 catalogue pin that the answers were checked against
--       7 If-Match, 8 If-None-Match: '' none, '*', or '|3|4|'; for a single step only
--       9 version that the step must have ('' = any), 10 id that its draft must have ('' = any)
--       11 the caller's time as RFC 3339, then for each step: number, answers as JSON
--
-- Returns {'ok', saved, highest, created_at, updated_at, number, version, ...},
--         {'not_found'}, {'other_catalogue', pin}, {'finalized'},
--         {'conflict', current version or ''}, {'changed'} when 9 or 10 does not hold,
--         {'damaged', key}
--
-- Safe to send twice: see session.lua.

if not state.status then
  return {'not_found'}
end
if state.catalogue ~= ARGV[6] then
  return {'other_catalogue', state.catalogue}
end
if state.finalized_at ~= '' then
  return {'finalized'}
end

for i = 1, #versions do
  local number, version = tonumber(ARGV[10 + 2 * i]), tonumber(versions[i])
  if not version and (versions[i] or string.sub(state.saved, number, number) == '1') then
    return {'damaged', PROGRESS}
  end
  versions[i] = version or 0
end

local if_match, if_none_match, expected, draft_id = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
if if_match ~= '' or if_none_match ~= '' or expected ~= '' then
  local number = tonumber(ARGV[12])
  local current = string.sub(state.saved, number, number) == '1' and whole(versions[1]) or ''
  local function among(tags)
    return current ~= '' and (tags == '*' or string.find(tags, '|' .. current .. '|', 1, true))
  end
  if (if_match ~= '' and not among(if_match)) or (if_none_match ~= '' and among(if_none_match)) then
    return {'conflict', current}
  end
  if expected ~= '' and expected ~= current then
    return {'changed'}
  end
end
if draft_id ~= '' then
  local draft = redis.call('GET', KEYS[6])
  if not draft or not string.find(draft, '"draft_id":"' .. draft_id .. '"', 1, true) then
    return {'changed'}
  end
end

-- Both as long as most saves need them: tables that grow cost more.
local fields = {'', '', '', ''}
local reply = {'ok', state.saved, state.highest, state.created_at, at_ms, '1', '1'}
local saved, ever, first = state.saved, state.ever or string.rep('0', #state.saved), nil
for i = 1, #versions do
  local key, step, data = KEYS[3 + 2 * i], ARGV[10 + 2 * i], ARGV[11 + 2 * i]
  local number, version = tonumber(step), whole(versions[i] + 1)
  redis.call('SET', key, '{"step_id":' .. step .. ',"version":' .. version
    .. ',"saved_at":"' .. ARGV[11] .. '","data":' .. data .. '}', 'PXAT', deadline)
  local at = 4 * i - 4
  fields[at + 1], fields[at + 2], fields[at + 3], fields[at + 4] = 'v' .. step, version, 's' .. step, at_ms
  reply[4 + 2 * i], reply[5 + 2 * i] = step, version
  if string.sub(saved, number, number) ~= '1' then
    saved = string.sub(saved, 1, number - 1) .. '1' .. string.sub(saved, number + 1)
    if number > tonumber(state.highest) then
      state.highest = step
    end
  end
  if string.sub(ever, number, number) ~= '1' then
    ever = string.sub(ever, 1, number - 1) .. '1' .. string.sub(ever, number + 1)
    first = first or {}
    first[#first + 1] = number
  end
end
if not state.ever or state.held == '0' then
  place_anew()
elseif first then
  place_anew(first, state.ever)
end
-- What is as it was is not written again.
local is_as_it_was = saved == state.saved and ever == state.ever and state.held == '1'
state.saved, state.ever, state.held = saved, ever, '1'
if is_as_it_was then
  change(unpack(fields))
else
  change('saved', saved, 'highest', state.highest, 'ever', ever, 'held', '1', unpack(fields))
end
for i = 1, #versions do
  redis.call('DEL', KEYS[4 + 2 * i])
  record('step_saved', 'step_id', reply[4 + 2 * i], 'version', reply[5 + 2 * i])
end
reply[2], reply[3] = state.saved, state.highest
-- Numbers and a word, none of which JSON would write otherwise.
return answer(reply, nil, '["' .. table.concat(reply, '","') .. '"]')
