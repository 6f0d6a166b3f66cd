"""Lua scripts of `RedisStore`, which Redis runs without anything between their commands."""

EVENTS_OF = """
local rows = {}
for place, number in ipairs(redis.call('LRANGE', KEYS[1], -ARGV[1], -1)) do
  rows[place] = redis.call('HGET', KEYS[2], number)
end
return rows
"""
"""Keys: list of a user's numbers, events. Argument: most. Result: the user's last events, oldest first."""

FORGET = """
local numbers = redis.call('LRANGE', KEYS[1], 0, -1)
for _, number in ipairs(numbers) do redis.call('HDEL', KEYS[2], number) end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[3], ARGV[1])
return #numbers
"""
"""Keys: list of a user's numbers, events, users. Argument: the user. Result: how many events there were."""

DROP = """
local store, events, users, items, changes, of = unpack(KEYS)
local most_users, most_events, since, most_items, at_once = unpack(ARGV)
local function text(number) return string.format('%.0f', number) end

local beyond = redis.call('ZCARD', users) - most_users
if beyond > 0 then
  for _, user in ipairs(redis.call('ZRANGE', users, 0, beyond - 1)) do
    for _, number in ipairs(redis.call('LRANGE', of .. user, 0, -1)) do redis.call('HDEL', events, number) end
    redis.call('DEL', of .. user)
    redis.call('ZREM', users, user)
  end
end

local first = tonumber(redis.call('HGET', store, 'first'))
local last = tonumber(redis.call('HGET', store, 'seq'))
local begin = first
while first <= last and first - begin < tonumber(at_once) do
  local row = redis.call('HGET', events, text(first))
  if row then
    local event = cjson.decode(row)
    local user = event[1]
    if first > last - most_events and event[7] >= tonumber(since) then break end
    redis.call('HDEL', events, text(first))
    redis.call('LPOP', of .. user)
    if redis.call('EXISTS', of .. user) == 0 then redis.call('ZREM', users, user) end
  end
  first = first + 1
end
if first > begin then redis.call('HSET', store, 'first', text(first)) end

beyond = redis.call('ZCARD', changes) - most_items
if beyond > 0 then
  for _, item in ipairs(redis.call('ZRANGE', changes, 0, beyond - 1)) do
    redis.call('HDEL', items, item)
    redis.call('ZREM', changes, item)
  end
end
"""
"""Drops silent users, the oldest events and the oldest cold items.

Keys: store, events, users, items, changes, beginning of the lists of users. Arguments: most users, most events, time
since which events are kept, most items, most events to drop at once.
"""

RELEASE = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end
"""
"""Key: turn. Argument: token. Ends the turn of whoever has the token."""
