"""Students at their labs: they take a sandbox, ask again, give it back or let it expire; all of it is written down.

They ask as the script for a track does: with its time-out, its pauses and its idea of what is final.
"""

import asyncio
import itertools
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

from instruqt.instruqt_broker_allocation import BACKOFF_SEC, DEFAULT_BUDGET_SEC, REQUEST_TIMEOUT_SEC
from tests.chaos.evidence import Operation, OperationKind, Outcome
from tests.integration.stack import track_headers

THINK_SEC = (0.2, 1.5)
"""Between two things that a student does."""
PROBE_TIMEOUT_SEC = 1.0
PROBE_PAUSE_SEC = 0.1


@dataclass(frozen=True, slots=True)
class Script:
    """One run of a script: all its attempts together."""

    kind: OperationKind
    student: str
    began_at: float
    ended_at: float
    attempts: int
    last: Operation

    @property
    def succeeded(self) -> bool:
        return self.last.outcome == "ok"


@dataclass
class History:
    operations: list[Operation] = field(default_factory=list)
    scripts: list[Script] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def number(self) -> int:
        return next(self._numbers)


class Students:
    """Those who work at the same time, each a life after the other. `run` goes on until `stop`, then lets whoever
    has begun finish. As a context manager it ends its connections on exit."""

    def __init__(self, gateways: Sequence[str], history: History, chance: random.Random) -> None:
        self._gateways = gateways
        self._history = history
        self._chance = chance
        self._stopping = asyncio.Event()
        self._asking: set[int] = set()
        """The numbers of the operations that have not ended."""
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
        self._client = httpx.AsyncClient(limits=limits, trust_env=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def run(self, places: int) -> None:
        async with asyncio.TaskGroup() as class_room:
            for place in range(places):
                class_room.create_task(self._place(place))

    def stop(self) -> None:
        self._stopping.set()

    async def _place(self, place: int) -> None:
        chance = random.Random(self._chance.random())
        number = 0
        while not self._stopping.is_set():
            number += 1
            await _Student(f"student-{place}-{number}", self, chance).live()

    async def give_back(self, held: Iterable[tuple[str, str]]) -> None:
        """Each student their sandbox."""
        chance = random.Random(self._chance.random())
        for student, sandbox_id in held:
            await self.script("release", student, sandbox_id, chance=chance)

    async def probe(self, name: str, *, until: float) -> float | None:
        """When a new student was first given a sandbox who asks all the time; None if not before `until`."""
        chance = random.Random(name)
        for number in itertools.count():
            student = f"{name}-{number}"
            answer = await self.attempt("allocate", student, chance=chance, timeout_sec=PROBE_TIMEOUT_SEC)
            if answer.outcome == "ok":
                return answer.ended_at
            if time.time() > until:
                return None
            await asyncio.sleep(PROBE_PAUSE_SEC)
        raise AssertionError("unreachable")

    async def until_answered(self) -> None:
        """Whoever has asked until now has an answer, or has given up."""
        asking = set(self._asking)
        while asking & self._asking:  # noqa: ASYNC110 (each ends by itself)
            await asyncio.sleep(0.01)

    async def attempt(
        self,
        kind: OperationKind,
        student: str,
        sandbox_id: str | None = None,
        *,
        chance: random.Random,
        idempotency_key: str | None = None,
        timeout_sec: float = REQUEST_TIMEOUT_SEC,
    ) -> Operation:
        """One request to one of the gateways, as a load balancer would choose it."""
        path = "allocate" if kind == "allocate" else f"sandboxes/{sandbox_id}/mark-for-deletion"
        headers = track_headers(student)
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        number, invoked_at = self._history.number(), time.time()
        self._asking.add(number)
        response: httpx.Response | None = None
        failure = ""
        try:
            async with asyncio.timeout(timeout_sec):
                url = f"{chance.choice(self._gateways)}/v1/{path}"
                response = await self._client.post(url, headers=headers, timeout=timeout_sec)
        except (httpx.TransportError, TimeoutError) as error:
            failure = type(error).__name__
        finally:
            self._asking.remove(number)
        ended_at = time.time()
        body = _body(response)
        lease = body if kind == "allocate" else {}
        refusal = body.get("detail", {})
        operation = Operation(
            number=number,
            kind=kind,
            student=student,
            sandbox_id=sandbox_id or lease.get("sandbox_id"),
            idempotency_key=idempotency_key,
            invoked_at=invoked_at,
            ended_at=ended_at,
            outcome=_outcome(response, failure),
            status=None if response is None else response.status_code,
            code=failure or refusal.get("code", ""),
            retry_after_sec=refusal.get("retry_after", 0),
            allocated_at=lease.get("allocated_at"),
            expires_at=lease.get("expires_at"),
        )
        self._history.operations.append(operation)
        return operation

    async def script(
        self,
        kind: OperationKind,
        student: str,
        sandbox_id: str | None = None,
        *,
        chance: random.Random,
        idempotency_key: str | None = None,
    ) -> Operation:
        """Asks until the answer is final, or the script's time is up."""
        began_at = time.time()
        backoff, longest_backoff = BACKOFF_SEC
        attempts = 0
        while True:
            attempts += 1
            answer = await self.attempt(kind, student, sandbox_id, chance=chance, idempotency_key=idempotency_key)
            pause = answer.retry_after_sec + backoff * chance.uniform(0.5, 1)
            final = answer.status is not None and answer.status not in (408, 429) and answer.status < 500
            if final or time.time() + pause > began_at + DEFAULT_BUDGET_SEC:
                break
            await asyncio.sleep(pause)
            backoff = min(2 * backoff, longest_backoff)
        self._history.scripts.append(Script(kind, student, began_at, answer.ended_at, attempts, answer))
        return answer


@dataclass(frozen=True, slots=True)
class _Student:
    name: str
    students: Students
    chance: random.Random

    async def live(self) -> None:
        """One to three visits, each with a sandbox of its own unless the last one has not been given back."""
        for visit in range(self.chance.randint(1, 3)):
            key = f"{self.name}-{visit}" if self.chance.random() < 0.5 else None
            lease = await self._take(key)
            if lease.outcome != "ok" or lease.sandbox_id is None:
                await self._think()
                return
            await self._think()
            if self.chance.random() < 0.4:
                await self._take(key)
            if self.chance.random() < 0.2:
                await asyncio.gather(self._take(None), self._take(None))
            await self._think()
            if self.chance.random() < 0.25:
                return  # and lets it expire
            await self._give_back(lease.sandbox_id)
            if self.chance.random() < 0.3:
                await self._give_back(lease.sandbox_id)

    async def _take(self, key: str | None) -> Operation:
        return await self.students.script("allocate", self.name, chance=self.chance, idempotency_key=key)

    async def _give_back(self, sandbox_id: str) -> Operation:
        return await self.students.script("release", self.name, sandbox_id, chance=self.chance)

    async def _think(self) -> None:
        await asyncio.sleep(self.chance.uniform(*THINK_SEC))


def _outcome(response: httpx.Response | None, failure: str) -> Outcome:
    """Only what was never sent, and what the broker refuses by its rules, was certainly not done."""
    if response is None:
        return "refused" if failure in ("ConnectError", "ConnectTimeout") else "unknown"
    if response.is_success:
        return "ok"
    return "refused" if response.is_client_error else "unknown"


def _body(response: httpx.Response | None) -> dict[str, Any]:
    if response is None:
        return {}
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
