-- include parts.lua
-- include room.lua
-- The end of a session: put before the scripts that ask for it.
--
-- KEYS  1 a key of a session
-- ARGV  none of its own
--
-- Returns nothing: it gives `erase`.
--
-- Safe to send twice: it only defines, and what is gone stays gone.

local MOST_STEPS = 999

-- Remove every key of the session `prefix`, damaged ones too, and tell who follows it. Looks for
-- `steps` steps at least. Says how many keys there were. `kind` and `reason` are what the feed says.
local function erase(prefix, steps, at_ms, kind, reason)
  local events, ops = prefix .. 'events', prefix .. 'ops'
  local keys = {prefix .. 'metadata', prefix .. 'progress', events, ops, prefix .. 'export',
    prefix .. 'history', tokens_of(prefix)}
  for _, body in ipairs({'result', 'upload'}) do
    keys[#keys + 1] = prefix .. body
    for _, part in ipairs(parts_of(prefix .. body)) do
      keys[#keys + 1] = part
    end
  end

  local saved = redis.pcall('HGET', prefix .. 'progress', 'saved')
  -- Where the session does not say how many there are, there may be as many as in any catalogue.
  for step = 1, math.max(type(saved) == 'string' and #saved or MOST_STEPS, steps) do
    keys[#keys + 1] = prefix .. 'step:' .. step
    keys[#keys + 1] = prefix .. 'draft:' .. step
  end

  local memory = redis.pcall('HKEYS', ops)
  for _, field in ipairs(memory) do
    local of, key = string.match(field, '^(%a+):(.*)$')
    if of == 'key' or of == 'part' then
      keys[#keys + 1] = key
    end
  end

  -- The last event is not kept: its id goes on from the log that it ends.
  local id_ms, sequence = store_time_ms(), 0
  local newest = redis.pcall('XREVRANGE', events, '+', '-', 'COUNT', 1)
  if not newest.err and newest[1] then
    local ms, count = string.match(newest[1][1], '^(%d+)-(%d+)$')
    if tonumber(ms) >= id_ms then
      id_ms, sequence = tonumber(ms), tonumber(count) + 1
    end
  end

  local removed = 0
  for i = 1, #keys, 1000 do
    removed = removed + redis.call('DEL', unpack(keys, i, math.min(i + 999, #keys)))
  end
  if removed > 0 then
    redis.pcall('PUBLISH', events, string.format('deleted %.0f-%.0f %s', id_ms, sequence, at_ms))
  end
  if not IS_TAGGED then
    local id = string.match(prefix, '^onboarding:(.*):$')
    pcall(unplace, id)
    if removed > 0 then
      report_end(id, kind, reason, at_ms)
    end
  end
  return removed
end

