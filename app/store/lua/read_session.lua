-- Read a session and any number of its strings at one instant.
--
-- KEYS  1 metadata, 2 progress, from 3 strings of the session
-- ARGV  1 'values' to read the strings, 'drafts' to see which steps have a draft;
--       2 with 'drafts': up to which step
--
-- Returns {'ok', metadata, progress, parts, found}: metadata as a list of fields and values, progress
--         as the same with a line for each, and how many parts that was made of; found are the values
--         of the strings, or the numbers of the steps that have a draft,
--         {'not_found'}, {'damaged', key} when one of the hashes is none, or gone and the other is
--         not
--
-- Safe to send twice: it reads.
--
-- The keys of drafts are derived from the name of `progress`, as in session.lua: to be told them all
-- takes the caller longer than to ask.

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
local found = {}
if ARGV[1] == 'drafts' then
  local draft, drafts = string.sub(KEYS[2], 1, -#'progress' - 1) .. 'draft:', {}
  for step = 1, tonumber(ARGV[2]) do
    drafts[step] = draft .. step
  end
  -- Nearly always there is none, which one look at all of them tells.
  if redis.call('EXISTS', unpack(drafts)) > 0 then
    for step, key in ipairs(drafts) do
      if redis.call('EXISTS', key) == 1 then
        found[#found + 1] = step
      end
    end
  end
elseif #KEYS > 2 then
  found = redis.call('MGET', unpack(KEYS, 3))
end
-- In one piece: a reply takes as long to write as all the rest, if it is one of a hundred parts.
return {'ok', metadata, table.concat(progress, '\n'), #progress, found}
