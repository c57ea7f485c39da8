"""Log context: ids that every log line of the current task carries.

Commands take their `request_id` from it, so that a search for one id finds all log lines of a request in all
services. The context is for work in its own task or in one `with` block. If many requests share a task, each log
call passes the ids itself.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

MAX_IDS = 50
"""Maximum number of ids in one log line. Even with the longest ids, the line stays below the 16 KiB of log
drivers."""

# One variable with a mapping. structlog's own context keeps a variable for each id, and iterates over all variables
# for each line.
_ids: ContextVar[Mapping[str, object]] = ContextVar("story", default={})  # noqa: B039 (never mutated)


def ids() -> Mapping[str, object]:
    return _ids.get()


def request_id() -> str | None:
    """Return the `request_id` of the log context, None outside of a request."""
    value = _ids.get().get("request_id")
    return None if value is None else str(value)


def bind(**ids: object) -> None:
    """Add ids to the log context until the current task ends."""
    _ids.set({**_ids.get(), **ids})


@contextmanager
def bound(**ids: object) -> Iterator[None]:
    """Add ids to the log context of the block and of tasks started in it. Ids that are None are left out."""
    token = _ids.set({**_ids.get(), **{name: value for name, value in ids.items() if value is not None}})
    try:
        yield
    finally:
        _ids.reset(token)


def split_by_line(request_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Split ids into batches of MAX_IDS, one for each log line. Without ids, yield one empty batch."""
    for start in range(0, max(1, len(request_ids)), MAX_IDS):
        yield request_ids[start : start + MAX_IDS]
