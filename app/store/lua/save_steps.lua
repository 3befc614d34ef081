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

local names = {}
for i = 12, #ARGV, 2 do
  names[#names + 1] = 'v' .. ARGV[i]
end
local versions = redis.call('HMGET', PROGRESS, unpack(names))

for i, name in ipairs(names) do
  local number = tonumber(ARGV[10 + 2 * i])
  if string.sub(state.saved, number, number) == '1' and not tonumber(versions[i]) then
    return {'damaged', PROGRESS}
  end
end

if #names == 1 then
  local number = tonumber(ARGV[12])
  local current = string.sub(state.saved, number, number) == '1' and versions[1] or ''
  local if_match, if_none_match, expected, draft_id = ARGV[7], ARGV[8], ARGV[9], ARGV[10]
  local function among(tags)
    return current ~= '' and (tags == '*' or string.find(tags, '|' .. current .. '|', 1, true))
  end
  if (if_match ~= '' and not among(if_match)) or (if_none_match ~= '' and among(if_none_match)) then
    return {'conflict', current}
  end
  if expected ~= '' and expected ~= current then
    return {'changed'}
  end
  if draft_id ~= '' then
    local draft = redis.call('GET', KEYS[6])
    if not draft or not string.find(draft, '"draft_id":"' .. draft_id .. '"', 1, true) then
      return {'changed'}
    end
  end
end

local reply = {'ok', '', '', state.created_at, at_ms}
local fields, marks, highest = {}, {}, tonumber(state.highest)
state.ever = state.ever or string.rep('0', #state.saved)
local ever_before = state.ever
for i, name in ipairs(names) do
  local number, answers = ARGV[10 + 2 * i], ARGV[11 + 2 * i]
  local version = whole(tonumber(versions[i] or 0) + 1)
  redis.call('SET', KEYS[3 + 2 * i], '{"step_id":' .. number .. ',"version":' .. version
    .. ',"saved_at":"' .. ARGV[11] .. '","data":' .. answers .. '}', 'PXAT', deadline)
  local at = #fields
  fields[at + 1], fields[at + 2], fields[at + 3], fields[at + 4] = name, version, 's' .. number, at_ms
  reply[#reply + 1], reply[#reply + 2] = number, version
  marks[tonumber(number)] = true
  highest = math.max(highest, tonumber(number))
end
for number in pairs(marks) do
  state.saved = string.sub(state.saved, 1, number - 1) .. '1' .. string.sub(state.saved, number + 1)
  state.ever = string.sub(state.ever, 1, number - 1) .. '1' .. string.sub(state.ever, number + 1)
end
if state.ever ~= ever_before or state.held == '0' then
  state.held = '1'
  local at = #fields
  fields[at + 1], fields[at + 2], fields[at + 3], fields[at + 4] =
    'ever', state.ever, 'held', state.held
  place_anew()
end
state.highest = whole(highest)
change('saved', state.saved, 'highest', state.highest, unpack(fields))
for i = 1, #names do
  redis.call('DEL', KEYS[4 + 2 * i])
  record('step_saved', 'step_id', ARGV[10 + 2 * i], 'version', reply[5 + 2 * i])
end
reply[2], reply[3] = state.saved, state.highest
return answer(reply)
