"""Sender of the commands of administrators, for the audit."""

from typing import TypeVar

from fastapi import Request

from gateway.api.errors import ApiError
from gateway.web import auth
from sandbox_broker.contract.commands import Command

C = TypeVar("C", bound=Command)

MAX_REASON = 500
"""Longest reason of an administrator, in characters."""


def audited(request: Request, command: C) -> C:
    """Return the command with its sender and the query parameter `reason`. Raises ApiError INVALID_REQUEST."""
    reason = request.query_params.get("reason")
    if reason is not None and (len(reason) > MAX_REASON or "\0" in reason):
        problem = f"must have at most {MAX_REASON} characters, and no NUL"
        message = "The request has invalid parameters: reason. Correct them, then send the request again."
        raise ApiError("INVALID_REQUEST", message, fields=[{"field": "reason", "problem": problem}])
    return command.model_copy(update={"sender": auth.build_sender(request.scope, reason)})
