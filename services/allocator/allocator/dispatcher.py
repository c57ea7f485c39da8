"""Dispatcher: runs the commands of a batch and returns their replies.

It groups commands by type, runs the handlers of the lane, and isolates failing commands. Invalid and failing
commands become dead letters.
"""

import asyncio
import json
import math
from collections.abc import Sequence

import structlog

from allocator import domain, metrics, spans
from allocator.newest_lease import DatabaseBehind
from allocator.routing import Handler, Lane
from allocator.write_session import UNAVAILABLE, ConcurrentUpdate, Fenced, WriteSession
from sandbox_broker.contract.codec import InvalidCommand
from sandbox_broker.contract.commands import Command
from sandbox_broker.contract.replies import Refused, Reply, refuse
from sandbox_broker.database import connections
from sandbox_broker.messaging import dead_letters
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.observability import log_context

DATABASE_PAUSE_SEC = 1.0
"""Time after a database failure in which commands are refused at once, without an attempt."""

DATABASE_UNAVAILABLE = refuse("ALLOCATOR_UNAVAILABLE", cause="database")
DATABASE_BEHIND = refuse("DATABASE_BEHIND")
COMMAND_FAILED = refuse("INTERNAL_ERROR", cause="dead_letter")

log = structlog.get_logger()


class Dispatcher:
    """Runs commands through the handlers of one lane."""

    def __init__(self, lane: Lane, session: WriteSession, publisher: Publisher) -> None:
        self._lane = lane
        self._queue = lane.queue.name
        self._session = session
        self._publisher = publisher
        self._unavailable_until = -math.inf
        self._refusal = DATABASE_UNAVAILABLE

    async def dispatch(
        self, entries: Sequence[Command | InvalidCommand], batch_spans: spans.BatchSpans
    ) -> list[Reply]:
        """Return one reply per entry, in order. Raises Fenced if another allocator has taken over."""
        metrics.BATCH_SIZE.labels(self._queue).observe(len(entries))
        if self._lane.batched:
            parts = domain.split_on_conflict(entries)
            return [reply for part in parts for reply in await self._run_by_type(part, batch_spans)]
        replies: list[Reply] = []
        for entry in entries:
            with log_context.bound(request_id=_request_id(entry)):
                replies += await self._run_by_type([entry], batch_spans)
        return replies

    async def _run_by_type(
        self, entries: Sequence[Command | InvalidCommand], batch_spans: spans.BatchSpans
    ) -> list[Reply]:
        """Run all commands of one type together, in the order of the lane's handlers; reject the other entries."""
        replies: dict[int, Reply] = {}
        for command_type, handle in self._lane.handlers.items():
            commands = {index: entry for index, entry in enumerate(entries) if isinstance(entry, command_type)}
            if commands:
                results = await self._run_or_bisect(handle, list(commands.values()), batch_spans)
                replies.update(zip(commands, results, strict=True))
        for index, entry in enumerate(entries):
            if index not in replies:
                replies[index] = await self._reject(entry)
        return [replies[index] for index in range(len(entries))]

    async def _run_or_bisect(
        self, handle: Handler, commands: Sequence[Command], batch_spans: spans.BatchSpans
    ) -> list[Reply]:
        """Run a handler. After a permanent failure run each half of the commands, down to the single failing
        command; it becomes a dead letter."""
        loop = asyncio.get_running_loop()
        if loop.time() < self._unavailable_until:
            return self._refuse_all(commands)
        try:
            return await self._session.run(lambda: self._run(handle, commands, batch_spans))
        except (ArithmeticError, ValueError, ConcurrentUpdate) as error:
            # Before UNAVAILABLE, because asyncpg's error for an invalid parameter belongs to both.
            failure: Exception = error
        except UNAVAILABLE as error:
            log.error("database.lost", error=connections.describe_error(error))
            return self._pause_and_refuse(commands, DATABASE_UNAVAILABLE)
        except DatabaseBehind:
            return self._pause_and_refuse(commands, DATABASE_BEHIND)
        except Fenced:
            raise
        except Exception as error:  # noqa: BLE001 (redelivered, the command would fail again and block the queue)
            failure = error
        if len(commands) > 1:
            half = len(commands) // 2
            return [
                *await self._run_or_bisect(handle, commands[:half], batch_spans),
                *await self._run_or_bisect(handle, commands[half:], batch_spans),
            ]
        (command,) = commands
        log.error("command.failed", command=command.type, request_id=command.request_id, exc_info=failure)
        await dead_letters.publish_dead_letter(
            self._publisher,
            self._queue,
            command.model_dump_json(),
            f"{type(failure).__name__}: {connections.describe_error(failure)}",
        )
        return [COMMAND_FAILED]

    def _pause_and_refuse(self, commands: Sequence[Command], refusal: Refused) -> list[Reply]:
        self._session.close()
        self._unavailable_until = asyncio.get_running_loop().time() + DATABASE_PAUSE_SEC
        self._refusal = refusal
        return self._refuse_all(commands)

    def _refuse_all(self, commands: Sequence[Command]) -> list[Reply]:
        request_ids = [command.request_id for command in commands if command.request_id is not None]
        for batch in log_context.split_by_line(request_ids):
            log.info("commands.refused", code=self._refusal.code, command=commands[0].type, request_ids=batch)
        return [self._refusal] * len(commands)

    async def _run(
        self, handle: Handler, commands: Sequence[Command], batch_spans: spans.BatchSpans
    ) -> list[Reply]:
        session = self._session
        with (
            metrics.COMMIT.labels(commands[0].type).time(),
            spans.commit_spans(batch_spans, commands, session.epoch),
        ):
            return await handle(session, commands)

    async def _reject(self, entry: Command | InvalidCommand) -> Reply:
        """Dead-letter an entry without a handler in this lane."""
        if isinstance(entry, InvalidCommand):
            raw, reason = json.dumps(entry.raw), str(entry)
        else:
            raw, reason = entry.model_dump_json(), f"{entry.type} is not for {self._queue}"
        log.error("command.rejected", queue=self._queue, request_id=_request_id(entry), reason=reason)
        await dead_letters.publish_dead_letter(self._publisher, self._queue, raw, reason)
        return refuse("INVALID_COMMAND", reason=reason)


def _request_id(entry: Command | InvalidCommand) -> str | None:
    if isinstance(entry, InvalidCommand):
        request_id = entry.raw.get("request_id") if isinstance(entry.raw, dict) else None
        return request_id if isinstance(request_id, str) else None
    return entry.request_id
