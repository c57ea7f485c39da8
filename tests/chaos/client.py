"""Simulated students. They allocate sandboxes, wait in line, repeat requests, claim, extend and replace, and
release their lease or let it expire. Instruqt reports the end of some plays.

They use the time-out, the backoff and the retry rules of the Instruqt script. Every request is recorded.
"""

import asyncio
import itertools
import json
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from types import TracebackType
from typing import Any, Self

import httpx

from instruqt.instruqt_broker_allocation import (
    BACKOFF_SEC,
    DEFAULT_BUDGET_SEC,
    DEFAULT_WAIT_SEC,
    REQUEST_TIMEOUT_SEC,
)
from tests.chaos.evidence import Operation, OperationKind, Outcome
from tests.integration.instruqt_events import sign_event
from tests.integration.stack import TRACK_TOKEN

PAUSE_SEC = (0.2, 1.5)
"""Pause between two requests of a student."""
PROBE_TIMEOUT_SEC = 1.0
PROBE_PAUSE_SEC = 0.1
METER_PAUSE_SEC = 0.5
EXTENSION_HOURS = 10 / 3600
QUOTA_TRACK = "quota-lab"
QUOTA_STUDENTS = ("student-0-", "student-1-")
"""Students of two places, for the track with a quota. All others are served during every policy."""
STOCK_PREFIX = "stock-"
STOCK_STUDENTS = ("student-2-", "student-3-")
"""Students of two places, for the sandboxes that the provisioner creates. They wait in line."""
TOKEN_TRACK, TOKEN_PREFIX = "token-lab", "sandbox-"
OTHER_TRACK = "other-lab"
WRONG_SECRET = "another secret than that of the lease"
ATTACKS: Sequence[OperationKind] = ("allocate", "read", "release", "claim", "extend", "replace")
TOKEN_STUDENTS = ("student-4-", "student-5-")
"""Students of two places, with named tokens and lease secrets. Others try their leases and places in line without
the secret."""
TOKEN_STOCK_STUDENTS = "student-5-"
"""Students of one of these places wait in line for the sandboxes of STOCK_PREFIX."""
PLACE_ATTACK_RATE = 0.3
"""Share of the answers with a place after which another sender tries to take the place over."""
LEAVE_RATE = 0.05
"""Share of the places in line after which a student leaves silently."""


@dataclass(frozen=True, slots=True)
class Credentials:
    token: str = TRACK_TOKEN
    token_name: str | None = None
    """None: the token is one of the settings."""
    secret: str | None = None
    """Secret of the lease."""


@dataclass(frozen=True, slots=True)
class ScriptRun:
    """Run of the Instruqt script with all its attempts."""

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
    script_runs: list[ScriptRun] = field(default_factory=list)
    _numbers: "itertools.count[int]" = field(default_factory=lambda: itertools.count(1))

    def next_number(self) -> int:
        return next(self._numbers)

    def measure_longest_gap(self, since: float = 0, until: float = float("inf")) -> float:
        """Return the longest time without a served allocation or release in a period, in seconds."""
        served = sorted(one.ended_at for one in self.operations if one.outcome == "ok" and one.kind != "read")
        times = [since, *(at for at in served if since < at < until), until] if since else served
        return max((after - before for before, after in pairwise(times)), default=0)


class Students:
    """Concurrent students. `run` starts new ones until `stop`, then waits for the running ones.

    As a context manager it closes its connections on exit.
    """

    def __init__(self, gateways: Sequence[str], history: History, rng: random.Random) -> None:
        self._gateways = gateways
        self._history = history
        self._rng = rng
        self._stopping = asyncio.Event()
        self._pending: set[int] = set()
        """Numbers of the operations without a result."""
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=200)
        self._client = httpx.AsyncClient(limits=limits, trust_env=False)
        self.credentials = Credentials()
        """Token of TOKEN_STUDENTS. Each of them has a secret of its own."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.aclose()

    async def run(self, places: int) -> None:
        async with asyncio.TaskGroup() as tasks:
            for place in range(places):
                tasks.create_task(self._run_place(place))

    def stop(self) -> None:
        self._stopping.set()

    async def _run_place(self, place: int) -> None:
        rng = random.Random(self._rng.random())
        number = 0
        while not self._stopping.is_set():
            number += 1
            await _Student(f"student-{place}-{number}", self, rng).run_visits()

    async def release_all(self, leases: Iterable[tuple[str, str]]) -> None:
        """Release leases, given as pairs of student and sandbox id, with a token of the settings."""
        rng = random.Random(self._rng.random())
        for student, sandbox_id in leases:
            credentials = Credentials(secret=self.get_credentials(student).secret)
            await self.run_script("release", student, sandbox_id, rng=rng, credentials=credentials)

    async def probe(self, name: str, *, until: float) -> float | None:
        """Send allocations of new students until one succeeds. Return its time, or None if `until` has passed."""
        rng = random.Random(name)
        for number in itertools.count():
            student = f"{name}-{number}"
            operation = await self.send_request("allocate", student, rng=rng, timeout_sec=PROBE_TIMEOUT_SEC)
            if operation.outcome == "ok":
                return operation.ended_at
            if time.time() > until:
                return None
            await asyncio.sleep(PROBE_PAUSE_SEC)
        raise AssertionError("unreachable")

    async def measure(self) -> None:
        """Send allocations of new students at a fixed rate without end, so that every gap in the service shows."""
        rng = random.Random(self._rng.random())
        async with asyncio.TaskGroup() as requests:
            for number in itertools.count():
                requests.create_task(
                    self.send_request("allocate", f"meter-{number}", rng=rng, timeout_sec=PROBE_TIMEOUT_SEC)
                )
                await asyncio.sleep(METER_PAUSE_SEC)

    async def wait_for_pending(self) -> None:
        """Wait until all requests pending now have ended."""
        pending = set(self._pending)
        while pending & self._pending:  # noqa: ASYNC110 (each request ends by its time-out)
            await asyncio.sleep(0.01)

    def get_credentials(self, student: str) -> Credentials:
        if student.startswith(TOKEN_STUDENTS):
            return replace(self.credentials, secret=f"secret of {student}")
        return Credentials()

    async def send_request(
        self,
        kind: OperationKind,
        student: str,
        sandbox_id: str | None = None,
        *,
        rng: random.Random,
        idempotency_key: str | None = None,
        standby: bool = False,
        play_ended_at: int | None = None,
        credentials: Credentials | None = None,
        track: str | None = None,
        timeout_sec: float = REQUEST_TIMEOUT_SEC,
    ) -> Operation:
        """Send one request to a random gateway, as a load balancer would, and record it."""
        method, path = _build_route(kind, sandbox_id)
        credentials = credentials or self.get_credentials(student)
        headers, content = _build_headers(student, credentials), _CONTENTS.get(kind)
        if play_ended_at is not None:
            headers, content = sign_event(student, ended_at=play_ended_at)
        if kind == "allocate" and student.startswith(QUOTA_STUDENTS):
            headers["X-Instruqt-Track-ID"] = QUOTA_TRACK
        if kind == "allocate" and student.startswith(TOKEN_STUDENTS):
            headers["X-Instruqt-Track-ID"] = track or TOKEN_TRACK
            headers["X-Sandbox-Name-Prefix"] = TOKEN_PREFIX
        if kind == "allocate" and student.startswith((*STOCK_STUDENTS, TOKEN_STOCK_STUDENTS)):
            headers["X-Sandbox-Name-Prefix"] = STOCK_PREFIX
            headers["Prefer"] = f"respond-async, wait={DEFAULT_WAIT_SEC:g}"
        if idempotency_key is not None:
            headers["Idempotency-Key"] = idempotency_key
        if standby:
            headers["X-Lease-Mode"] = "standby"
        number, invoked_at = self._history.next_number(), time.time()
        self._pending.add(number)
        response: httpx.Response | None = None
        failure = ""
        cancellation: asyncio.CancelledError | None = None
        try:
            async with asyncio.timeout(timeout_sec):
                url = f"{rng.choice(self._gateways)}/v1/{path}"
                response = await self._client.request(
                    method, url, headers=headers, content=content, timeout=timeout_sec
                )
        except (httpx.TransportError, TimeoutError) as error:
            failure = type(error).__name__
        except asyncio.CancelledError as error:  # recorded too, because the request may have an effect
            failure, cancellation = "CancelledError", error
        finally:
            self._pending.remove(number)
        ended_at = time.time()
        body = _parse_body(response)
        lease = body if kind in ("allocate", "claim", "extend", "replace") else {}
        refusal = body.get("detail", {})
        operation = Operation(
            number=number,
            kind=kind,
            student=student,
            sandbox_id=sandbox_id or lease.get("sandbox_id"),
            new_sandbox_id=lease.get("sandbox_id") if kind == "replace" else None,
            idempotency_key=idempotency_key,
            token=None if kind == "end_play" else credentials.token_name,
            secret=None if kind == "end_play" else credentials.secret,
            track_name=headers.get("X-Instruqt-Track-ID"),
            invoked_at=invoked_at,
            ended_at=ended_at,
            outcome=_classify_outcome(response, failure),
            status=None if response is None else response.status_code,
            code=failure or refusal.get("code", ""),
            retry_after_sec=refusal.get("retry_after") or body.get("retry_after", 0),
            allocated_at=lease.get("allocated_at"),
            expires_at=lease.get("expires_at"),
            play_ended_at=play_ended_at,
        )
        self._history.operations.append(operation)
        if cancellation is not None:
            raise cancellation
        return operation

    async def run_script(
        self,
        kind: OperationKind,
        student: str,
        sandbox_id: str | None = None,
        *,
        rng: random.Random,
        idempotency_key: str | None = None,
        standby: bool = False,
        play_ended_at: int | None = None,
        credentials: Credentials | None = None,
    ) -> Operation:
        """Send requests until the response is final or the script's time budget is used.

        Each place in line starts the budget again. A student who leaves the line silently, also at the end of the
        round, leaves no result. All requests have the same token, which may end meanwhile.
        """
        credentials = credentials or self.get_credentials(student)
        began_at = budget_since = time.time()
        backoff, longest_backoff = BACKOFF_SEC
        attempts = 0
        while True:
            attempts += 1
            operation = await self.send_request(
                kind,
                student,
                sandbox_id,
                rng=rng,
                idempotency_key=idempotency_key,
                standby=standby,
                play_ended_at=play_ended_at,
                credentials=credentials,
            )
            if operation.outcome == "waiting" and time.time() < began_at + DEFAULT_WAIT_SEC:
                if self._stopping.is_set() or rng.random() < LEAVE_RATE:
                    return operation
                if credentials.secret is not None and rng.random() < PLACE_ATTACK_RATE:
                    await self._attack_place(student, credentials, rng)
                await asyncio.sleep(operation.retry_after_sec * rng.uniform(0.9, 1))
                budget_since, backoff = time.time(), BACKOFF_SEC[0]
                continue
            pause = operation.retry_after_sec + backoff * rng.uniform(0.5, 1)
            final = operation.status is not None and operation.status not in (408, 429) and operation.status < 500
            if kind == "end_play":  # Instruqt repeats each refused event; a gateway with a wrong clock refuses it
                final = operation.outcome == "ok"
            if final or time.time() + pause > budget_since + DEFAULT_BUDGET_SEC:
                break
            await asyncio.sleep(pause)
            backoff = min(2 * backoff, longest_backoff)
        self._history.script_runs.append(
            ScriptRun(kind, student, began_at, operation.ended_at, attempts, operation)
        )
        return operation

    async def _attack_place(self, student: str, credentials: Credentials, rng: random.Random) -> None:
        """Send the request of a waiting student without the secret, or for a lab that the token does not permit.

        Without a secret, so that a place or lease of this request is no obstacle for the student.
        """
        other = rng.choice([Credentials(), replace(credentials, secret=None)])
        track = rng.choice([None, OTHER_TRACK])
        await self.send_request("allocate", student, rng=rng, credentials=other, track=track)


@dataclass(frozen=True, slots=True)
class _Student:
    name: str
    students: Students
    rng: random.Random

    async def run_visits(self) -> None:
        """Make one to three visits. Each gets a new sandbox, unless the lease of the last visit is still active."""
        for visit in range(self.rng.randint(1, 3)):
            key = f"{self.name}-{visit}" if self.rng.random() < 0.5 else None
            standby = self.rng.random() < 0.2
            lease = await self._allocate(key, standby=standby)
            if lease.outcome != "ok" or lease.sandbox_id is None:
                await self._pause()
                return
            sandbox_id = lease.sandbox_id
            await self._read(sandbox_id)
            if self.name.startswith(TOKEN_STUDENTS):
                await self._attack(sandbox_id)
            await self._pause()
            is_claimed = not standby or self.rng.random() < 0.8
            if standby and is_claimed:
                await self._change("claim", sandbox_id)
            if is_claimed and self.rng.random() < 0.3:
                await self._change("extend", sandbox_id, key=f"{self.name}-{visit}-{sandbox_id}")
            if self.rng.random() < 0.1:
                replacement = await self._change("replace", sandbox_id)
                sandbox_id = replacement.new_sandbox_id or sandbox_id
            if self.rng.random() < 0.4:
                await self._allocate(key)
            if self.rng.random() < 0.2:
                await asyncio.gather(self._allocate(None), self._allocate(None))
            await self._pause()
            if self.rng.random() < 0.25:
                return  # the lease expires
            if self.rng.random() < 0.2:
                await self._end_play(sandbox_id)
                return  # another play has another participant id
            await self._release(sandbox_id)
            if self.rng.random() < 0.3:
                await self._release(sandbox_id)

    async def _allocate(self, key: str | None, *, standby: bool = False) -> Operation:
        return await self.students.run_script(
            "allocate", self.name, rng=self.rng, idempotency_key=key, standby=standby
        )

    async def _change(self, kind: OperationKind, sandbox_id: str, *, key: str | None = None) -> Operation:
        return await self.students.run_script(kind, self.name, sandbox_id, rng=self.rng, idempotency_key=key)

    async def _read(self, sandbox_id: str) -> Operation:
        return await self.students.send_request("read", self.name, sandbox_id, rng=self.rng)

    async def _attack(self, sandbox_id: str) -> None:
        """Send requests that the broker must refuse: without the secret of the lease, and for another lab."""
        token = self.students.get_credentials(self.name)
        kind = self.rng.choice(ATTACKS)
        await self.students.send_request(
            kind,
            self.name,
            None if kind == "allocate" else sandbox_id,
            rng=self.rng,
            # Without a secret, so that a lease of this request is no obstacle for the student.
            credentials=replace(token, secret=None if kind == "allocate" else WRONG_SECRET),
        )
        await self.students.send_request("allocate", f"{self.name}-elsewhere", rng=self.rng, track=OTHER_TRACK)

    async def _release(self, sandbox_id: str) -> Operation:
        return await self.students.run_script("release", self.name, sandbox_id, rng=self.rng)

    async def _end_play(self, sandbox_id: str) -> None:
        """Send the event of Instruqt, in some cases while the cleanup script of the track runs."""
        event = self.students.run_script("end_play", self.name, rng=self.rng, play_ended_at=int(time.time()))
        if self.rng.random() < 0.5:
            await asyncio.gather(event, self._release(sandbox_id))
        else:
            await event

    async def _pause(self) -> None:
        await asyncio.sleep(self.rng.uniform(*PAUSE_SEC))


def _build_route(kind: OperationKind, sandbox_id: str | None) -> tuple[str, str]:
    if kind == "allocate":
        return "POST", "allocate"
    if kind == "read":
        return "GET", f"sandboxes/{sandbox_id}"
    if kind == "end_play":
        return "POST", "instruqt/events"
    return "POST", f"sandboxes/{sandbox_id}/{'mark-for-deletion' if kind == 'release' else kind}"


_CONTENTS: Mapping[OperationKind, bytes] = {
    "extend": json.dumps({"hours": EXTENSION_HOURS}).encode(),
    "replace": b'{"reason": "broken"}',
}


def _build_headers(student: str, credentials: Credentials) -> dict[str, str]:
    headers = {"Authorization": f"Bearer {credentials.token}", "X-Instruqt-Sandbox-ID": student}
    return headers if credentials.secret is None else {**headers, "X-Lease-Secret": credentials.secret}


def _classify_outcome(response: httpx.Response | None, failure: str) -> Outcome:
    """Classify a request. Only requests without a connection, and 4xx responses, certainly had no effect."""
    if response is None:
        return "refused" if failure in ("ConnectError", "ConnectTimeout") else "unknown"
    if response.status_code == 202 and _parse_body(response).get("status") == "waiting":
        return "waiting"
    if response.is_success:
        return "ok"
    return "refused" if response.is_client_error else "unknown"


def _parse_body(response: httpx.Response | None) -> dict[str, Any]:
    if response is None:
        return {}
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
