"""Faults as data: what each does to the broker, what ends it, and how soon students must be served again.

killing.py, links.py, servers.py, queues.py, deliveries.py and clocks.py make them; matrix.py has them all.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.chaos.stack import Chaos

Act = Callable[[Chaos], Awaitable[None]]


class NotReached(Exception):
    """Nothing has happened: the message says why."""


async def nothing(_: Chaos) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    kind: str
    """What the table at the end counts it as."""
    name: str
    touches: frozenset[str]
    """Of two faults at a time none may touch what the other does."""
    inject: Act
    heal: Act = nothing
    lasts_sec: float = 0.0
    served_within_sec: float = 10.0
    """A new student, from the fault's end; from its beginning where a standby takes over."""
    standby: bool = False
    covered: bool = False
    """Whether the standby answers even what was asked before it took over."""
