"""Status of the broker, with the problems in it for an operator to solve."""

from typing import Any

from brokerctl.answers import AttentionItem, Status
from brokerctl.client import AdminClient, BackgroundCall, describe_unreachable_gateway
from brokerctl.errors import OtherApi, Unavailable

STATUS_TIMEOUT_SEC = 0.5
"""Default time for the gateway's answer. The gateway limits each of its probes to 0.3 s."""


def fetch_status(client: AdminClient, timeout_sec: float) -> dict[str, Any]:
    """Return the body of GET /v1/admin/status, plus `gateway` (its state).

    A gateway that is down, or unknown because it is slower than `timeout_sec`, is part of the result: it is then
    the only item of `attention`. Raises `CommandError` for everything else, such as a wrong token.
    """
    try:
        status = BackgroundCall(lambda: client.get("status", Status)).result(timeout_sec)
    except TimeoutError as error:
        problem = f"{describe_unreachable_gateway(client.url, str(error))} --within waits longer."
        return _without_gateway("unknown", problem)
    except OtherApi:
        raise
    except Unavailable as error:
        return _without_gateway("down", error.message)
    status.setdefault(
        "attention",
        [
            _gateway_item(
                "It is of an earlier version, and lists no problems.",
                "Read the components above, or upgrade the gateway.",
            )
        ],
    )
    return {"gateway": {"state": "up", "problem": None}, **status}


def _without_gateway(state: str, problem: str) -> dict[str, Any]:
    item = _gateway_item(problem, "The components behind the gateway cannot be seen from here.")
    return {"gateway": {"state": state, "problem": problem}, "attention": [item]}


def _gateway_item(problem: str, advice: str) -> AttentionItem:
    return {"part": "gateway", "problem": problem, "effect": "", "advice": advice, "command": None}


def format_age(at: float | None, now: float) -> str:
    if at is None:
        return "never"
    seconds = max(0, int(now - at))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds // size} {unit} ago"
    return f"{seconds} s ago"
