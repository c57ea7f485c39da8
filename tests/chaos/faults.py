"""Faults as data: the action that injects each, the action that heals it, and the time limit for recovery.

The modules `*_faults` create the faults; `matrix` combines them.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.chaos.stack import ChaosBroker

FaultAction = Callable[[ChaosBroker], Awaitable[None]]


class FaultNotReached(Exception):
    """The fault did not occur. The message is the reason."""


async def do_nothing(_: ChaosBroker) -> None:
    pass


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    kind: str
    """Row of the fault in the final table."""
    name: str
    affects: frozenset[str]
    """Components with the fault. Two faults run together only if these sets are disjoint."""
    inject: FaultAction
    heal: FaultAction = do_nothing
    duration_sec: float = 0.0
    served_within_sec: float = 10.0
    """Time limit until a new student is served: from the end of the fault, or with a standby from its start."""
    has_standby: bool = False
    standby_answers_pending: bool = False
    """The standby must also answer requests pending at the fault."""
