"""Bodies of requests to the simulated APIs."""

from typing import Any

from starlette.requests import Request


async def read_object(request: Request) -> dict[str, Any]:
    """Return the JSON body, or an empty object if the body is missing or invalid."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
