"""Generator of docs/errors.md: `python -m gateway.api.error_page`."""

import sys

from gateway.api.error_table import ERRORS

_HEAD = """\
<!-- Made by `make docs` from services/gateway/gateway/api/error_table.py. -->
# Errors of the API

Every response without a 2xx status has this body:

```json
{"detail": {"code": "POOL_EXHAUSTED", "message": "…", "request_id": "…", "retry_after": 30}}
```

- `code` is for programs.
- `message` is for people. It states the fact, then the action.
- `request_id` is also in the `X-Request-ID` header of the response and in the log of each service.
- `retry_after` (seconds, also in the `Retry-After` header) is present if a retry can succeed. For `RATE_LIMITED` it
  is the time until the window of the rate limit ends.
- `fields` lists the invalid parameters of `INVALID_REQUEST`.

| status | code | meaning | what to do | `retry_after` |
| --- | --- | --- | --- | --- |
"""


def render_page() -> str:
    return _HEAD + "".join(
        f"| {spec.status} | `{code}` | {spec.meaning} | {spec.advice} | {spec.retry_after or ''} |\n"
        for code, spec in ERRORS.items()
    )


if __name__ == "__main__":
    sys.stdout.write(render_page())
