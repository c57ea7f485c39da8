"""`python -m gateway.error_page`: docs/errors.md, made from the table of errors."""

import sys

from gateway.api.errors import KINDS

_HEAD = """\
<!-- Made by `make docs` from services/gateway/gateway/api/errors.py. -->
# Errors of the API

Every response that is not 2xx has this body, whatever went wrong:

```json
{"detail": {"code": "POOL_EXHAUSTED", "message": "…", "request_id": "…", "retry_after": 30}}
```

`code` is for programs, `message` for people; it says what to do next. `request_id` is also the `X-Request-ID`
header of the response, and is in our log. `retry_after` (seconds, also the `Retry-After` header) is there wherever
asking again can help; that of `RATE_LIMITED` is what is left of the window. `fields` names the parameters of
`INVALID_REQUEST`.

| status | code | meaning | what to do | `retry_after` |
| --- | --- | --- | --- | --- |
"""


def page() -> str:
    return _HEAD + "".join(
        f"| {kind.status} | `{code}` | {kind.meaning} | {kind.advice} | {kind.retry_after or ''} |\n"
        for code, kind in KINDS.items()
    )


if __name__ == "__main__":
    sys.stdout.write(page())
