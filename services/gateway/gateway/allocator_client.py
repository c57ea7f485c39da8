"""From an HTTP request to a reply of the allocator.

Requests that wait while an envelope is being published go out together in the next one: under load the queue
carries few large messages, and a lone request waits for nobody.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import structlog
from starlette.types import Scope

from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import MAX_ENVELOPE
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher, Unroutable
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.observability import log_context

MAX_IN_FLIGHT = 2000
"""Requests that wait for a reply; past that the next is refused at once instead of making all of them late."""
WATCH_PERIOD_SEC = 0.5
LOOK_TIMEOUT_SEC = 1.0
"""For an answer of RabbitMQ about an allocator that was not there."""
DOUBT_SEC = 3.0
"""For one about an allocator that was: a slow answer must not fail everybody who waits."""

_WAITING = "gateway.waiting"

log = structlog.get_logger()


class Unavailable(Exception):
    """The queue or the allocator is down, or too many requests are in flight."""


class Gone(Exception):
    """The client has disconnected: nobody waits for the answer."""


@dataclass(slots=True, eq=False)
class _Entry:
    command: Command
    deadline: float
    reply: asyncio.Future[Reply]


class Allocator:
    """The allocator, as the gateway sees it. `run` and `watch` must be running."""

    def __init__(self, publisher: Publisher, requester: RpcClient) -> None:
        self._publisher = publisher
        self._requester = requester
        self._waiting: deque[_Entry] = deque()
        self._wake = asyncio.Event()
        self._in_flight: set[_Entry] = set()
        self._present = False
        self._looking: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    async def ask(self, command: Command, *, timeout_sec: float, scope: Scope | None = None) -> Reply:
        """Raises Unavailable, or TimeoutError: then the command may still be carried out. So it may on Gone, where
        `scope` is that of a request whose client leaves."""
        if not self._present:
            await self._look()  # it may have come since the last look
        if not (self._present and self._requester.connected):
            raise Unavailable("The queue or the allocator is down.")
        if self.in_flight >= MAX_IN_FLIGHT:
            raise Unavailable("Too many requests are in flight.")
        loop = asyncio.get_running_loop()
        entry = _Entry(command, loop.time() + timeout_sec, loop.create_future())
        timer = loop.call_at(entry.deadline, _expire, entry)
        if scope is not None:
            scope[_WAITING] = entry.reply
        self._in_flight.add(entry)
        self._waiting.append(entry)
        self._wake.set()
        try:
            return await entry.reply
        except Disconnected as error:
            raise Unavailable("The queue or the allocator went away.") from error
        finally:
            timer.cancel()
            self._in_flight.discard(entry)

    async def run(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while entries := self._next_envelope():
                await self._send(entries)

    def _next_envelope(self) -> list[_Entry]:
        entries: list[_Entry] = []
        while self._waiting and len(entries) < MAX_ENVELOPE:
            entry = self._waiting.popleft()
            if not entry.reply.done():  # else the caller has gone
                entries.append(entry)
        return entries

    async def _send(self, entries: Sequence[_Entry]) -> None:
        left = max(entry.deadline for entry in entries) - asyncio.get_running_loop().time()
        try:
            replies = await self._requester.send(
                topology.ALLOCATOR_COMMANDS,
                [entry.command for entry in entries],
                timeout_sec=max(left, 0.001),
            )
        except (Disconnected, Unroutable) as error:
            request_ids = [entry.command.request_id for entry in entries[: log_context.MAX_IDS]]
            log.warning("command.not_sent", error=str(error), commands=len(entries), request_ids=request_ids)
            for entry in entries:
                if not entry.reply.done():
                    entry.reply.set_exception(Disconnected(str(error)))
        else:
            replies.add_done_callback(partial(_hand_out, entries))

    async def watch(self) -> None:
        """Looks whether anybody consumes the commands: nobody home is told at once, not after a time-out."""
        while True:
            await self._look()
            await asyncio.sleep(WATCH_PERIOD_SEC)

    async def _look(self) -> None:
        """One look at a time, whoever waits for it."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._count_consumers())
        await asyncio.shield(self._looking)

    async def _count_consumers(self) -> None:
        try:
            timeout_sec = DOUBT_SEC if self._present else LOOK_TIMEOUT_SEC
            present = await self._publisher.consumers(topology.ALLOCATOR_COMMANDS.name, timeout_sec=timeout_sec) > 0
        except Disconnected:
            present = False
        if present != self._present:
            log.info("allocator.present" if present else "allocator.absent")
        self._present = present
        if not present:
            for entry in self._in_flight:
                if not entry.reply.done():
                    entry.reply.set_exception(Disconnected("no allocator is there to answer"))


def leave(scope: Scope) -> None:
    """The client of this request has gone. Who waits for its reply is freed, and what was not sent yet never is."""
    reply: asyncio.Future[Reply] | None = scope.get(_WAITING)
    if reply is not None and not reply.done():
        reply.set_exception(Gone())


def _expire(entry: _Entry) -> None:
    if not entry.reply.done():
        entry.reply.set_exception(TimeoutError("no reply in time"))


def _hand_out(entries: Sequence[_Entry], replies: asyncio.Future[tuple[Reply, ...]]) -> None:
    error = Disconnected("cancelled") if replies.cancelled() else replies.exception()
    for place, entry in enumerate(entries):
        if entry.reply.done():
            continue
        if error is None:
            entry.reply.set_result(replies.result()[place])
        else:
            entry.reply.set_exception(error)
