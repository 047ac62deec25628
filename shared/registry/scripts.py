"""Lua scripts: what Redis has to do in one step, because several processes write the same keys."""

LEAD = """
-- KEYS: leader, term. ARGV: controller id, now in ms, lease in ms, the highest term that can be true.
local current = redis.call('GET', KEYS[1])
local own = ARGV[1] .. '|'
local function checked(text)
    local term = tonumber(text or '')
    if term and term >= 0 and term <= tonumber(ARGV[4]) then return term end
    return nil
end
if current and string.sub(current, 1, #own) ~= own then return false end
local term = current and checked(string.sub(current, #own + 1))
if not term then
    local last = redis.call('GET', KEYS[2])
    term = math.max(tonumber(ARGV[2]), (checked(last) or 0) + 1)
    redis.call('SET', KEYS[2], string.format('%.0f', term))
end
redis.call('SET', KEYS[1], own .. string.format('%.0f', term), 'PX', ARGV[3])
return string.format('%.0f', term)
"""

RESIGN = "if redis.call('GET', KEYS[1]) == ARGV[1] then return redis.call('DEL', KEYS[1]) end return 0"

WRITE_MAP = """
-- KEYS: leader, maps, map versions. ARGV: leader and term, group, map, version.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[2], ARGV[2], ARGV[3])
redis.call('HSET', KEYS[3], ARGV[2], ARGV[4])
return 1
"""

REMOVE_MAP = """
-- KEYS: leader, maps, map versions. ARGV: leader and term, group.
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return 0 end
redis.call('HDEL', KEYS[2], ARGV[2])
redis.call('HDEL', KEYS[3], ARGV[2])
return 1
"""

CLAIM = """
-- KEYS: a gateway's open answers, gateways with open answers, its claimed answers.
-- ARGV: gateway id, time to live in ms.
local answers = redis.call('HGETALL', KEYS[1])
redis.call('DEL', KEYS[1])
redis.call('SREM', KEYS[2], ARGV[1])
for position = 1, #answers, 2 do redis.call('SADD', KEYS[3], answers[position]) end
if #answers > 0 then redis.call('PEXPIRE', KEYS[3], ARGV[2]) end
return answers
"""
