"""What a handler works with, and what it raises when another allocator was faster."""

from dataclasses import dataclass
from datetime import timedelta

import asyncpg

from sandbox_broker.messaging.publisher import Publisher


class Overtaken(Exception):
    """Another allocator changed the same rows while we looked: repeat, and see its work."""


@dataclass(frozen=True, slots=True)
class Writer:
    """What a handler works with: the one connection that writes, and the epoch that allows it to."""

    connection: asyncpg.Connection
    epoch: int
    lab_duration: timedelta
    publisher: Publisher
