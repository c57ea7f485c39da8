-- Students who ask over HTTP. Arguments, each as name=value:
--   token     of the track
--   name      what the students' ids begin with
--   once      so many requests at the same moment, and no more after them
--   repeats   the requests are of so many students, in turn; else each is of a new one
--   prefixes  each request asks for one of so many prefixes of names, in turn, and gives it as its track too
--   think_ms  how long a connection waits before a request, on average: at random, as if nobody knew of the others
--   hold      sandboxes are released, those first that have been held for longest, when more than so many are held
-- Writes what was counted as one line of JSON.

local options, threads = { once = 0, repeats = 0, prefixes = 0, think_ms = 0, hold = 0 }, {}
local held, oldest, newest = {}, 1, 0
local sent = 0
-- Read from outside, where answers are looked at: that costs the load generator time, so not everywhere.
new, known, released = -1, -1, -1

function setup(thread)
  threads[#threads + 1] = thread
end

function init(args)
  for _, argument in ipairs(args) do
    local name, value = argument:match("^([%w_]+)=(.*)$")
    options[name] = options[name] and tonumber(value) or value
  end
  if options.once > 0 then
    -- wrk knows no end but the time: whoever is beyond the limit waits for longer than that.
    local asked = 0
    delay = function()
      asked = asked + 1
      return asked <= options.once and 0 or 3600000
    end
  elseif options.think_ms > 0 then
    delay = function()
      return math.floor(-options.think_ms * math.log(1 - math.random()) + 0.5)
    end
  end
  if options.repeats > 0 or options.hold > 0 then
    new, known, released = 0, 0, 0
    response = answered
  end
end

local function post(path, more)
  return "POST /v1/" .. path .. " HTTP/1.1\r\nHost: bench\r\nContent-Length: 0\r\nAuthorization: Bearer "
    .. options.token .. "\r\n" .. more .. "\r\n\r\n"
end

function request()
  if options.hold > 0 and newest - oldest >= options.hold then
    local lease = held[oldest]
    held[oldest], oldest = nil, oldest + 1
    return post("sandboxes/" .. lease.sandbox .. "/mark-for-deletion", "X-Instruqt-Sandbox-ID: " .. lease.student)
  end
  sent = sent + 1
  local student = options.name .. "-" .. (options.repeats > 0 and sent % options.repeats + 1 or sent)
  local more = "X-Instruqt-Sandbox-ID: " .. student
  if options.prefixes > 0 then
    local prefix = "lab" .. sent % options.prefixes .. "-"
    more = more .. "\r\nX-Instruqt-Track-ID: " .. prefix .. "\r\nX-Sandbox-Name-Prefix: " .. prefix
  else
    more = more .. "\r\nX-Instruqt-Track-ID: lab-of-the-bench"
  end
  if options.hold > 0 then
    -- It comes back with the answer, which does not tell otherwise whose it is.
    more = more .. "\r\nX-Request-ID: " .. student
  end
  return post("allocate", more)
end

function answered(status, headers, body)
  if body:find('"deletion_requested_at"', 1, true) then
    released = released + (status == 200 and 1 or 0)
  elseif status == 201 then
    new = new + 1
    if options.hold > 0 then
      newest = newest + 1
      held[newest] = { sandbox = body:match('"sandbox_id":"([^"]+)"'), student = headers["x-request-id"] }
    end
  elseif status == 200 then
    known = known + 1
  end
end

function done(summary, latency, requests)
  local errors, counted = summary.errors, { new = 0, known = 0, released = 0 }
  for _, thread in ipairs(threads) do
    for name in pairs(counted) do
      counted[name] = counted[name] + thread:get(name)
    end
  end
  io.write(string.format(
    '{"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "slowest_us": %d, "refused": %d, "broken": %d, '
    .. '"new": %d, "known": %d, "released": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    counted.new, counted.known, counted.released
  ))
end
