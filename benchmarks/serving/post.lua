-- SPDX-License-Identifier: Apache-2.0
-- wrk script: post different bodies in turn, and report as one line of JSON.
-- Arguments: content type, a file that lists the body files one a line.

local requests, turn = {}, 0

function init(args)
   wrk.method = "POST"
   wrk.headers["Content-Type"] = args[1]
   for path in io.lines(args[2]) do
      local file = assert(io.open(path, "rb"))
      requests[#requests + 1] = wrk.format(nil, nil, nil, file:read("*a"))
      file:close()
   end
end

function request()
   turn = turn % #requests + 1
   return requests[turn]
end

function done(summary, latency)
   local errors = summary.errors
   io.write(string.format(
      'RESULT {"answered": %d, "refused": %d, "broken": %d, "seconds": %.6f, '
         .. '"p50_ms": %.3f, "p90_ms": %.3f, "p99_ms": %.3f, "max_ms": %.3f}\n',
      summary.requests, errors.status, errors.connect + errors.read + errors.write + errors.timeout,
      summary.duration / 1e6, latency:percentile(50) / 1e3, latency:percentile(90) / 1e3,
      latency:percentile(99) / 1e3, latency.max / 1e3))
end
