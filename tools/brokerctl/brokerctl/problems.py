"""What can stand in the way of a command, and the exit status that tells scripts which it was.

    Problem
    ├── Refused        1  the broker says no: doing the same again gives the same
    ├── Misconfigured  2  the command, its settings or its token are wrong
    └── Unavailable    3  no answer, or a part of the broker cannot now: trying again can help

0 is done, or all well; 4 is that something needs attention.
"""

from collections.abc import Mapping
from typing import Any

DONE, ATTENTION, INTERRUPTED = 0, 4, 130


class Problem(Exception):
    """The message says what to do."""

    status: int

    def __init__(self, message: str, *, detail: Mapping[str, Any] | None = None) -> None:
        """`detail` is what the broker's error body holds, where it was the broker that spoke."""
        super().__init__(message)
        self.message = message
        self.detail = {"message": message, **(detail or {})}

    @property
    def code(self) -> str | None:
        return self.detail.get("code")


class Refused(Problem):
    status = 1


class Misconfigured(Problem):
    status = 2


class Unavailable(Problem):
    status = 3
