-- Read a session at one instant, with any number of its strings, or which of its steps have a draft.
--
-- KEYS  1 metadata, 2 progress, from 3 strings of the session
-- ARGV  1 up to which step drafts are looked for; 0 = the strings are read
--
-- Returns {'ok', metadata, progress, parts, found}: metadata as a list of fields and values, progress
--         as the same with a line for each, and how many parts that was made of; found are the values
--         of the strings, or the numbers of the steps that have a draft,
--         {'not_found'}, {'damaged', key} when one of the hashes is none, or gone and the other is
--         not
--
-- The drafts are not named as keys, which would take longer to send than to read: they share the
-- session's id with `progress` and, under a hash tag, its slot.
--
-- Safe to send twice: it reads.

local metadata = redis.pcall('HGETALL', KEYS[1])
local progress = redis.pcall('HGETALL', KEYS[2])
if #metadata == 0 and #progress == 0 and not metadata.err and not progress.err then
  return {'not_found'}
end
-- The key that is at fault, and not all that are read here.
if #metadata == 0 then
  return {'damaged', KEYS[1]}
end
if #progress == 0 then
  return {'damaged', KEYS[2]}
end
local found, steps = {}, tonumber(ARGV[1])
if steps > 0 then
  local draft = string.sub(KEYS[2], 1, -#'progress' - 1) .. 'draft:'
  -- Numbers become names; as many as most wizards have stand here as text, since to write them takes
  -- half as long as to look for all the drafts.
  local drafts = {'1', '2', '3', '4', '5', '6', '7', '8', '9', '10', '11', '12', '13', '14', '15', '16',
    '17', '18', '19', '20', '21', '22', '23', '24', '25', '26', '27', '28', '29', '30'}
  for step = 1, steps do
    drafts[step] = draft .. (drafts[step] or step)
  end
  -- Nearly always there is none, which one look at all of them tells.
  if redis.call('EXISTS', unpack(drafts, 1, steps)) > 0 then
    for step = 1, steps do
      if redis.call('EXISTS', drafts[step]) == 1 then
        found[#found + 1] = step
      end
    end
  end
elseif #KEYS > 2 then
  found = redis.call('MGET', unpack(KEYS, 3))
end
-- In one piece: a reply takes as long to write as all the rest, if it is one of a hundred parts.
return {'ok', metadata, table.concat(progress, '\n'), #progress, found}
