"""RPC client of the gateway for allocator commands. It coalesces concurrent requests.

New requests are queued while an envelope is being published. The next envelope carries all of them. Under load the
RabbitMQ queue therefore holds few large messages, and a single request is published without delay.
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
from sandbox_broker.contract.commands import Command, R
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.outcome import NoReply, ServiceUnavailable, UnexpectedReply, read_reply
from sandbox_broker.messaging.publisher import Publisher, Unroutable
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.observability import log_context

MAX_IN_FLIGHT = 2000
"""Limit of requests that wait for a reply. Further requests fail at once, because they would delay all others."""
PROBE_PERIOD_SEC = 0.5
PROBE_TIMEOUT_WHEN_DOWN_SEC = 1.0
"""Probe timeout while the allocator is considered down."""
PROBE_TIMEOUT_WHEN_UP_SEC = 3.0
"""Probe timeout while the allocator is considered up. It is longer: a failed probe fails all pending requests."""
TIMER_SEC = 0.001
"""Precision of the timers of uvloop."""

_PENDING_REPLY = "gateway.pending_reply"

log = structlog.get_logger()


class ClientDisconnected(Exception):
    """The HTTP client has disconnected."""


@dataclass(slots=True, eq=False)
class _PendingRequest:
    command: Command
    began: float
    deadline: float
    """Both are times of the event loop."""
    reply: asyncio.Future[Reply]


class AllocatorClient:
    """RPC client for allocator commands. The tasks `run` and `watch` must be running."""

    def __init__(self, publisher: Publisher, rpc_client: RpcClient) -> None:
        self._publisher = publisher
        self._rpc_client = rpc_client
        self._queued: deque[_PendingRequest] = deque()
        self._wake = asyncio.Event()
        self._in_flight: set[_PendingRequest] = set()
        self._timer: asyncio.TimerHandle | None = None
        """Timer of all requests in flight, at the earliest of their deadlines or before."""
        self._timer_at = float("inf")
        self._present = False
        self._probe: asyncio.Task[None] | None = None

    @property
    def in_flight(self) -> int:
        """Number of requests that wait for a reply."""
        return len(self._in_flight)

    async def request(self, command: Command[R], *, timeout_sec: float, scope: Scope | None = None) -> R:
        """Send the command and return its reply.

        `scope` is the ASGI scope of the HTTP request; `cancel_pending` cancels the request by it. Raises
        ClientDisconnected, or the errors of `RpcClient.request`: CommandRefused, ServiceUnavailable (also if too
        many requests are in flight), NoReply or UnexpectedReply.
        """
        if not self._present:
            await self._look_for_allocator()
        if not (self._present and self._rpc_client.connected):
            raise ServiceUnavailable("The queue or the allocator is down.")
        if self.in_flight >= MAX_IN_FLIGHT:
            raise ServiceUnavailable("Too many requests are in flight.")
        loop = asyncio.get_running_loop()
        began = loop.time()
        pending = _PendingRequest(command, began, began + timeout_sec, loop.create_future())
        if pending.deadline < self._timer_at:
            self._set_timer(pending.deadline)
        if scope is not None:
            scope[_PENDING_REPLY] = pending.reply
        self._in_flight.add(pending)
        self._queued.append(pending)
        self._wake.set()
        try:
            reply = await pending.reply
        except Disconnected as error:
            raise ServiceUnavailable("The connection to the queue or the allocator was lost.") from error
        except TimeoutError as error:
            raise NoReply("no reply in time") from error
        except ValueError as error:
            raise UnexpectedReply(str(error)) from error
        finally:
            self._in_flight.discard(pending)
        return read_reply(command, reply)

    def _set_timer(self, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = asyncio.get_running_loop().call_at(at, self._expire_overdue)

    def _expire_overdue(self) -> None:
        """Expire overdue requests, and set the timer for the next one. One timer for all requests costs less than a
        timer for each, because few requests last until their deadline."""
        self._timer, self._timer_at = None, float("inf")
        now = asyncio.get_running_loop().time() + TIMER_SEC
        waiting = [pending for pending in self._in_flight if not pending.reply.done()]
        for pending in waiting:
            if pending.deadline <= now:
                pending.reply.set_exception(TimeoutError("no reply in time"))
        if later := [pending.deadline for pending in waiting if pending.deadline > now]:
            self._set_timer(min(later))

    async def run(self) -> None:
        """Publish queued requests until cancelled."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            while batch := self._take_batch():
                await self._send(batch)

    def _take_batch(self) -> list[_PendingRequest]:
        batch: list[_PendingRequest] = []
        while self._queued and len(batch) < MAX_ENVELOPE:
            pending = self._queued.popleft()
            if not pending.reply.done():  # done: timed out or cancelled while queued
                batch.append(pending)
        return batch

    async def _send(self, batch: Sequence[_PendingRequest]) -> None:
        remaining_sec = max(pending.deadline for pending in batch) - asyncio.get_running_loop().time()
        try:
            replies = await self._rpc_client.send(
                topology.ALLOCATOR_COMMANDS,
                [pending.command for pending in batch],
                timeout_sec=max(remaining_sec, 0.001),
            )
        except (Disconnected, Unroutable) as error:
            request_ids = [pending.command.request_id for pending in batch[: log_context.MAX_IDS]]
            log.warning("command.not_sent", error=str(error), commands=len(batch), request_ids=request_ids)
            for pending in batch:
                if not pending.reply.done():
                    pending.reply.set_exception(Disconnected(str(error)))
        else:
            replies.add_done_callback(partial(_deliver_replies, batch))

    async def watch(self) -> None:
        """Poll the consumer count of the command queue, so that requests fail at once when no allocator runs."""
        while True:
            await self._refresh_presence()
            await asyncio.sleep(PROBE_PERIOD_SEC)

    async def _look_for_allocator(self) -> None:
        """Wait for a probe that begins after this call, or for an earlier one that finds an allocator."""
        is_running = self._probe is not None and not self._probe.done()
        await self._refresh_presence()
        if is_running and not self._present:
            await self._refresh_presence()

    async def _refresh_presence(self) -> None:
        """Probe the allocator. Concurrent callers share one probe."""
        if self._probe is None or self._probe.done():
            self._probe = asyncio.create_task(self._count_consumers())
        await asyncio.shield(self._probe)

    async def _count_consumers(self) -> None:
        began = asyncio.get_running_loop().time()
        try:
            timeout_sec = PROBE_TIMEOUT_WHEN_UP_SEC if self._present else PROBE_TIMEOUT_WHEN_DOWN_SEC
            present = (
                await self._publisher.count_consumers(topology.ALLOCATOR_COMMANDS.name, timeout_sec=timeout_sec) > 0
            )
        except Disconnected:
            present = False
        if present != self._present:
            log.info("allocator.present" if present else "allocator.absent")
        self._present = present
        if not present:
            for pending in self._in_flight:
                # An allocator may have started since the probe began, and may have got a later request.
                if pending.began <= began and not pending.reply.done():
                    pending.reply.set_exception(Disconnected("no allocator consumes the command queue"))


def cancel_pending(scope: Scope) -> None:
    """Fail the pending request of this HTTP request with ClientDisconnected. An unsent command is never sent."""
    reply: asyncio.Future[Reply] | None = scope.get(_PENDING_REPLY)
    if reply is not None and not reply.done():
        reply.set_exception(ClientDisconnected())


def _deliver_replies(batch: Sequence[_PendingRequest], replies: asyncio.Future[tuple[Reply, ...]]) -> None:
    error = Disconnected("cancelled") if replies.cancelled() else replies.exception()
    for index, pending in enumerate(batch):
        if pending.reply.done():
            continue
        if error is None:
            pending.reply.set_result(replies.result()[index])
        else:
            pending.reply.set_exception(error)
