"""The ids of the work at hand: every log line has them, and the commands that it sends carry its `request_id` on,
so that a request's whole story is found by its id in the logs of all services.

For work in a task of its own or within one `with`. Where thousands of requests share a task, their lines name their
ids themselves.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

MAX_IDS = 50
"""In one log line: at the longest they may be, less than what log drivers cut a line at (16 KiB)."""

# One variable with a mapping in it. structlog's own keep one for each id, and look through all that there are at
# each line.
_ids: ContextVar[Mapping[str, object]] = ContextVar("story", default={})  # noqa: B039 (it is never changed in place)


def ids() -> Mapping[str, object]:
    return _ids.get()


def request_id() -> str | None:
    """Of the request that the work at hand is done for, if there is one."""
    found = _ids.get().get("request_id")
    return None if found is None else str(found)


def bind(**ids: object) -> None:
    """From here to the end of this task."""
    _ids.set({**_ids.get(), **ids})


@contextmanager
def bound(**ids: object) -> Iterator[None]:
    """Within the block, and in the tasks that are begun there. An id that is None is left out."""
    token = _ids.set({**_ids.get(), **{name: value for name, value in ids.items() if value is not None}})
    try:
        yield
    finally:
        _ids.reset(token)


def by_line(request_ids: Sequence[str]) -> Iterator[Sequence[str]]:
    """Cuts a list of ids into pieces for one line each; without any there is one line all the same."""
    for start in range(0, max(1, len(request_ids)), MAX_IDS):
        yield request_ids[start : start + MAX_IDS]
