"""Errors of a command. The exit status of each class lets scripts distinguish them.

    CommandError
    ├── Refused        1  the broker refused the command: repeating it gives the same result
    ├── Misconfigured  2  the command line, a setting or the token is wrong
    └── Unavailable    3  the broker did not answer, or a component is down: a retry can help
        └── OtherApi      another server answered

0 means done or all well. 4 means something needs attention.
"""

from collections.abc import Mapping, Sequence
from typing import Any

EXIT_ATTENTION, EXIT_INTERRUPTED = 4, 130


class CommandError(Exception):
    """Reason why a command failed. The message states the fact, then the action."""

    exit_status: int

    def __init__(self, message: str, *, detail: Mapping[str, Any] | None = None, lines: Sequence[str] = ()) -> None:
        """`detail` is the `detail` object of the broker's error response, if the broker sent one. `lines` are shown
        below the message."""
        super().__init__(message)
        self.message = message
        self.lines = lines
        self.detail = {"message": message, **(detail or {})}

    @property
    def code(self) -> str | None:
        return self.detail.get("code")


class Refused(CommandError):
    exit_status = 1


class Misconfigured(CommandError):
    exit_status = 2


class Unavailable(CommandError):
    exit_status = 3


class OtherApi(Unavailable):
    """The server answered, but not with the answers of this broker's API."""
