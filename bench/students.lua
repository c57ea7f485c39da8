-- wrk script: requests of students. Options, each as name=value:
--   token           the track token, or several with commas between them, used in turn
--   student_prefix  prefix of the student ids
--   burst           send this many requests at once, then no more
--   students        cycle through this many students; 0: each request is for a new student
--   prefixes        cycle through this many sandbox name prefixes; the prefix is also the track id
--   think_ms        mean pause of a connection before a request. Exponentially distributed, so that the students'
--                   requests are independent of each other
--   max_held        release the oldest lease while more than this many are held
-- Writes the counts as one line of JSON.

local options = { burst = 0, students = 0, prefixes = 0, think_ms = 0, max_held = 0 }
local threads = {}
local tokens = {}
local held, oldest, newest = {}, 1, 0
local sent = 0
-- done() reads these globals from each thread. They stay -1 unless responses are inspected, because inspection costs
-- the load generator time.
new, known, released = -1, -1, -1

function setup(thread)
  threads[#threads + 1] = thread
end

function init(args)
  for _, argument in ipairs(args) do
    local name, value = argument:match("^([%w_]+)=(.*)$")
    options[name] = options[name] and tonumber(value) or value
  end
  for token in options.token:gmatch("[^,]+") do
    tokens[#tokens + 1] = token
  end
  if options.burst > 0 then
    -- wrk stops only after its duration. Connections beyond the limit therefore wait for longer than that.
    local started = 0
    delay = function()
      started = started + 1
      return started <= options.burst and 0 or 3600000
    end
  elseif options.think_ms > 0 then
    delay = function()
      return math.floor(-options.think_ms * math.log(1 - math.random()) + 0.5)
    end
  end
  if options.students > 0 or options.max_held > 0 then
    new, known, released = 0, 0, 0
    response = count_response
  end
end

local function build_post(path, headers)
  return "POST /v1/" .. path .. " HTTP/1.1\r\nHost: bench\r\nContent-Length: 0\r\nAuthorization: Bearer "
    .. tokens[sent % #tokens + 1] .. "\r\n" .. headers .. "\r\n\r\n"
end

function request()
  if options.max_held > 0 and newest - oldest >= options.max_held then
    local lease = held[oldest]
    held[oldest], oldest = nil, oldest + 1
    return build_post(
      "sandboxes/" .. lease.sandbox .. "/mark-for-deletion", "X-Instruqt-Sandbox-ID: " .. lease.student
    )
  end
  sent = sent + 1
  local student = options.student_prefix .. "-" .. (options.students > 0 and sent % options.students + 1 or sent)
  local headers = "X-Instruqt-Sandbox-ID: " .. student
  if options.prefixes > 0 then
    local prefix = "lab" .. sent % options.prefixes .. "-"
    headers = headers .. "\r\nX-Instruqt-Track-ID: " .. prefix .. "\r\nX-Sandbox-Name-Prefix: " .. prefix
  else
    headers = headers .. "\r\nX-Instruqt-Track-ID: bench-track"
  end
  if options.max_held > 0 then
    -- The broker echoes X-Request-ID. The response body does not name the student.
    headers = headers .. "\r\nX-Request-ID: " .. student
  end
  return build_post("allocate", headers)
end

function count_response(status, headers, body)
  if body:find('"deletion_requested_at"', 1, true) then
    released = released + (status == 200 and 1 or 0)
  elseif status == 201 then
    new = new + 1
    if options.max_held > 0 then
      newest = newest + 1
      held[newest] = { sandbox = body:match('"sandbox_id":"([^"]+)"'), student = headers["x-request-id"] }
    end
  elseif status == 200 then
    known = known + 1
  end
end

function done(summary, latency, requests)
  local errors, counts = summary.errors, { new = 0, known = 0, released = 0 }
  for _, thread in ipairs(threads) do
    for name in pairs(counts) do
      counts[name] = counts[name] + thread:get(name)
    end
  end
  io.write(string.format(
    '{"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "slowest_us": %d, "http_errors": %d, '
    .. '"socket_errors": %d, "new": %d, "known": %d, "released": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout,
    counts.new, counts.known, counts.released
  ))
end
