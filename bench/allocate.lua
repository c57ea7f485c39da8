-- One allocation after the other, each for a student of its own.
-- Arguments: the token, what the students' ids begin with, and how many requests to send at most (0: no limit).
-- Writes what wrk has counted as one line of JSON.

local head, tail, sent, limit

function init(args)
  local prefix
  local token = args[1]
  prefix, limit, sent = args[2], tonumber(args[3]), 0
  head = "POST /v1/allocate HTTP/1.1\r\nHost: bench\r\nContent-Length: 0\r\nAuthorization: Bearer " .. token
    .. "\r\nX-Instruqt-Track-ID: lab-of-the-bench\r\nX-Instruqt-Sandbox-ID: " .. prefix .. "-"
  tail = "\r\n\r\n"
  if limit > 0 then
    -- wrk knows no end but the time: whoever is beyond the limit waits for longer than that.
    local asked = 0
    delay = function()
      asked = asked + 1
      return asked <= limit and 0 or 3600000
    end
  end
end

function request()
  sent = sent + 1
  return head .. sent .. tail
end

function done(summary, latency, requests)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "duration_us": %d, "p50_us": %d, "p99_us": %d, "slowest_us": %d, "refused": %d, "broken": %d}\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency.max,
    errors.status, errors.connect + errors.read + errors.write + errors.timeout
  ))
end
