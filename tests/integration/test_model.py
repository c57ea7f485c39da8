"""Model-based test: the running broker and the reference model agree after any sequence of requests.

Hypothesis generates the sequences. For a disagreement it reports the shortest sequence found.
"""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import httpx
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration import hypothesis_settings
from tests.integration.model import (
    TOKEN_TRACKS,
    Credentials,
    CspState,
    Lease,
    Model,
    Policy,
    Refused,
    Request,
    Waiting,
)
from tests.integration.stack import ADMIN, Stack, run_stack, track_headers

SEQUENCES, STEPS = 12, 40

MAX_SANDBOXES = 9
STUDENTS = st.sampled_from(["ada", "grace", "alan"])
KEYS = st.sampled_from([None, None, "k1", "k2"])
NAMES = st.sampled_from(["lab-a-", "lab-b-", "lab_a-"])
PREFIXES = st.sampled_from([None, None, "lab-a-", "lab-b", "lab_", "LAB-A-", "lab-a-1", "%"])
TRACKS = st.sampled_from([None, None, "exam"])
TOKEN_NAMES = st.sampled_from(["morning", "evening"])
SECRETS = st.sampled_from([None, None, "the secret of one machine", "the secret of another"])
POLICIES = st.sampled_from(
    [{}, {"exam": Policy(max_active=1)}, {"exam": Policy(max_active=2, wait_min=10)}, {"exam": Policy(wait_min=0)}]
)
"""Policies by track."""
WAITS_MIN = st.sampled_from([0, 5, 20, 60])
SANDBOX_NUMBERS = st.integers(0, MAX_SANDBOXES)
"""Numbers of sandboxes in the order of their creation in CSP. The last number has no sandbox."""
MINUTES = st.sampled_from([10, 60, 4 * 60, 24 * 60])

CSP_BEHAVIOUR: dict[CspState, dict[str, Any]] = {
    CspState.WORKS: {"delete_error_rate": 0, "reject_tokens": False, "fail_next_deletes": 0},
    CspState.FAILS_DELETIONS: {"delete_error_rate": 1, "reject_tokens": False},
    CspState.REJECTS_TOKEN: {"delete_error_rate": 0, "reject_tokens": True},
}

# Expiry and deletion run immediately. All other background work is disabled, and no request times out.
SETTINGS = {
    "ADMIN_WAIT_SEC": "60",
    "ALLOCATE_TIMEOUT_SEC": "60",
    "AUTO_EXPIRY_INTERVAL_SEC": "0.2",
    "BROKEN_HOLD_HOURS": "87600",
    "CLEANUP_INTERVAL_SEC": "1",
    "CIRCUIT_BREAKER_THRESHOLD": "1000000",
    "CIRCUIT_BREAKER_TIMEOUT_SEC": "0.1",
    "DELETION_BACKOFF_BASE_SEC": "0.05",
    "DELETION_MAX_ATTEMPTS": "2",
    "RECORD_RETENTION_DAYS": "3650",
    "SYNC_INTERVAL_SEC": "864000",
    "WAITING_TTL_SEC": "3600",
}

# Advance the time by moving all stored timestamps into the past.
MOVE_TIMESTAMPS = (
    """UPDATE leases SET allocated_at = allocated_at - $1::interval, expires_at = expires_at - $1::interval,
        ended_at = ended_at - $1::interval, claimed_at = claimed_at - $1::interval""",
    "UPDATE lease_extensions SET expires_at = expires_at - $1::interval",
    """UPDATE sandboxes SET status_since = status_since - $1::interval, deleted_at = deleted_at - $1::interval,
        missing_since = missing_since - $1::interval, deletion_due_at = deletion_due_at - $1::interval,
        deletion_requested_at = deletion_requested_at - $1::interval""",
    "UPDATE waiting SET waiting_since = waiting_since - $1::interval, ends_at = ends_at - $1::interval",
    """UPDATE csp_listings SET begun_at = begun_at - $1::interval, applied_at = applied_at - $1::interval,
        held_at = held_at - $1::interval""",
)

T = TypeVar("T")


def has_sandbox_in(*statuses: str) -> Callable[["BrokerMachine"], bool]:
    """Build a precondition: at least one sandbox has one of these statuses."""
    return lambda broker: any(sandbox.status in statuses for sandbox in broker.model.sandboxes.values())


@pytest.fixture
async def own_stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=SETTINGS) as stack,
    ):
        yield stack


class BrokerMachine(RuleBasedStateMachine):
    """Execute each step on the model and on the broker, and compare the results.

    The machine runs in its own thread. Its requests to the broker run in the event loop of the tests.
    """

    stack: Stack
    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.accounts: dict[str, dict[str, Any]] = {}
        """All accounts ever created in CSP, by sandbox id."""
        self.bodies: dict[str, dict[str, Any]] = {}
        """Response body of each new or changed lease, by sandbox id."""
        self.tokens: list[str] = []
        """Tokens in the order of `model.tokens`."""
        self.answered_at: dict[str, int] = {}
        """Time of the model at that response."""

    @initialize(
        csp=st.sampled_from(CspState),
        counts=st.sampled_from([(4, 2), (0, 1)]),
        max_active=st.sampled_from([None, 1]),
        waiting=st.sampled_from([[], ["grace", "mary"]]),
        change=st.sampled_from([None, "revoke", "suspend"]),
    )
    def set_up_pool(
        self,
        csp: CspState,
        counts: tuple[int, int],
        max_active: int | None,
        waiting: list[str],
        change: str | None,
    ) -> None:
        self._run(self.stack.fill(0))
        self._forget_timed_out()
        for name_prefix, count in zip(("lab-a-", "lab-b-"), counts, strict=True):
            for _ in range(count):
                self.create_account(name_prefix)
        self.sync(force=False)
        self.issue_token("morning", max_active)
        if waiting:
            self._wait_until_import(waiting, Credentials(self.model.tokens[0]), change)
        self.set_csp_state(csp)

    def _forget_timed_out(self) -> None:
        """Let each student wait and leave, because the allocator remembers those whose longest wait is over."""
        for student in ("ada", "grace", "alan", "mary"):
            for wait_sec in (60, 0):
                self._run(self.stack.allocate(student, Prefer=f"respond-async, wait={wait_sec}"))

    # Students

    @rule(student=STUDENTS, secret=SECRETS)
    def allocate(self, student: str, secret: str | None) -> None:
        self._allocate(Request(student, credentials=Credentials(secret=secret)))

    @rule(student=STUDENTS, prefix=PREFIXES, key=KEYS, track=TRACKS, standby=st.booleans())
    def allocate_with_options(
        self, student: str, prefix: str | None, key: str | None, track: str | None, standby: bool
    ) -> None:
        self._allocate(Request(student, prefix, key, track, standby))

    @rule(student=STUDENTS, prefix=PREFIXES, key=KEYS, track=TRACKS, standby=st.booleans(), wait_min=WAITS_MIN)
    def wait_in_line(
        self, student: str, prefix: str | None, key: str | None, track: str | None, standby: bool, wait_min: int
    ) -> None:
        """Join the line, repeat or change the request, or leave it, if no sandbox fits."""
        self._allocate(Request(student, prefix, key, track, standby, wait_min))

    @precondition(lambda self: bool(self.model.line))
    @rule(data=st.data())
    def repeat_request(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.model.line) - 1), label="number in line")
        place = self.model.line[number]
        if place.replaces is None:
            self._allocate(place.request)
        else:
            request = place.request
            self._replace(request.student, place.replaces, request.wait_min, request.credentials)

    @precondition(lambda self: bool(self.tokens))
    @rule(
        data=st.data(),
        student=STUDENTS,
        prefix=PREFIXES,
        key=KEYS,
        track=st.sampled_from([None, "exam", "exam", "exam"]),
        secret=SECRETS,
        wait_min=st.none() | WAITS_MIN,
    )
    def allocate_with_token(
        self,
        data: st.DataObject,
        student: str,
        prefix: str | None,
        key: str | None,
        track: str | None,
        secret: str | None,
        wait_min: int | None,
    ) -> None:
        token = data.draw(st.sampled_from(range(len(self.tokens))), label="token")
        credentials = Credentials(self.model.tokens[token], secret)
        self._allocate(Request(student, prefix, key, track, wait_min=wait_min, credentials=credentials))

    @precondition(lambda self: bool(self.tokens) and len(self.accounts) < MAX_SANDBOXES)
    @rule(
        data=st.data(),
        students=st.permutations(["ada", "grace", "mary"]),
        secret=SECRETS,
        change=st.sampled_from([None, None, "revoke", "suspend"]),
    )
    def wait_with_token_until_import(
        self, data: st.DataObject, students: list[str], secret: str | None, change: str | None
    ) -> None:
        number = data.draw(st.sampled_from(range(len(self.tokens))), label="token")
        self._wait_until_import(students[:2], Credentials(self.model.tokens[number], secret), change)

    def _wait_until_import(self, students: list[str], credentials: Credentials, change: str | None) -> None:
        """Wait in line for accounts that are created next. Before their import, the token may change."""
        for student in students:
            self._allocate(Request(student, "lab_a-", track="exam", wait_min=60, credentials=credentials))
        if change is not None and credentials.token is not None:
            self.change_token(credentials.token.name, change)
        for _ in range(min(2, MAX_SANDBOXES - len(self.accounts))):
            self.create_account("lab_a-")
        self.sync(force=True)

    @precondition(lambda self: bool(self.model.line))
    @rule(data=st.data(), secret=SECRETS, track=st.sampled_from([None, "exam"]), wait_min=st.none() | WAITS_MIN)
    def use_place_with_any_credentials(
        self, data: st.DataObject, secret: str | None, track: str | None, wait_min: int | None
    ) -> None:
        """Repeat the request of a waiting student with any token and secret. Most are wrong."""
        number = data.draw(st.integers(0, len(self.model.line) - 1), label="number in line")
        token = data.draw(st.sampled_from([None, *range(len(self.tokens))]), label="token")
        credentials = Credentials(None if token is None else self.model.tokens[token], secret)
        request = self.model.line[number].request
        self._allocate(replace(request, track=track, wait_min=wait_min, credentials=credentials))

    @precondition(has_sandbox_in("allocated"))
    @rule(
        data=st.data(),
        secret=SECRETS,
        use=st.sampled_from(["allocate", "read", "claim", "extend", "replace", "release"]),
        wait_min=st.none() | WAITS_MIN,
    )
    def use_with_any_credentials(
        self, data: st.DataObject, secret: str | None, use: str, wait_min: int | None
    ) -> None:
        """Use the sandbox of a student with any token and secret. Most are wrong."""
        sandbox_id = self._draw_sandbox(data, self._with_status("allocated"))
        lease = self.model.leases[sandbox_id]
        token = data.draw(st.sampled_from([None, *range(len(self.tokens))]), label="token")
        credentials = Credentials(None if token is None else self.model.tokens[token], secret)
        match use:
            case "allocate":
                self._allocate(Request(lease.holder, track=lease.track, credentials=credentials))
            case "read":
                self._read_sandbox(lease.holder, sandbox_id, credentials)
            case "claim":
                self._claim(lease.holder, sandbox_id, None, credentials)
            case "extend":
                self._extend(lease.holder, sandbox_id, 1, credentials)
            case "replace":
                self._replace(lease.holder, sandbox_id, wait_min, credentials)
            case "release":
                self._release(lease.holder, sandbox_id, credentials)

    def _headers(self, student: str, credentials: Credentials) -> dict[str, str]:
        headers = track_headers(student)
        for number, token in enumerate(self.model.tokens):
            if token is credentials.token:
                headers["Authorization"] = f"Bearer {self.tokens[number]}"
        return headers if credentials.secret is None else {**headers, "X-Lease-Secret": credentials.secret}

    def _credentials_of(self, sandbox_id: str) -> Credentials:
        """Return credentials for the lease of a sandbox: its secret, and a token of the settings."""
        lease = self.model.leases.get(sandbox_id)
        return Credentials() if lease is None else Credentials(secret=lease.secret)

    def _is_refused(self, response: httpx.Response, credentials: Credentials, sandbox_id: str) -> bool:
        """Return whether the credentials do not suffice, and the response says so."""
        try:
            self.model.authorize(credentials, sandbox_id)
        except Refused as refused:
            self._assert_refused(response, refused)
            return True
        return False

    def _allocate(self, request: Request) -> None:
        wait = None if request.wait_min is None else f"respond-async, wait={request.wait_min * 60}"
        headers = {
            "X-Sandbox-Name-Prefix": request.prefix,
            "Idempotency-Key": request.key,
            "X-Instruqt-Track-ID": request.track,
            "X-Lease-Mode": "standby" if request.standby else None,
            "Prefer": wait,
            **self._headers(request.student, request.credentials),
        }
        response = self._run(
            self.stack.allocate(
                request.student, **{name: value for name, value in headers.items() if value is not None}
            )
        )
        try:
            expected = self.model.allocate(request)
        except Refused as refused:
            self._assert_refused(response, refused)
            return
        body = response.json()
        if isinstance(expected, Waiting):
            assert response.status_code == 202, response.text
            assert (body["status"], body["position"]) == ("waiting", expected.position)
        elif isinstance(expected, Lease) and expected.sandbox_id in self.bodies:
            assert response.status_code == 200, response.text
            assert body == self._expected_body(expected)
        else:
            assert response.status_code == 201, response.text
            assert body["expires_at"] - body["allocated_at"] == (24 if request.standby else 4) * 3600
            if not isinstance(expected, Lease):
                assert body["sandbox_id"] in expected
                expected = self.model.grant(request, body["sandbox_id"])
            self._record(body)
            assert body == self._expected_body(expected)

    def _read_served_leases(self, leases: Sequence[Lease]) -> None:
        """Wait until the broker has served the line, and read the new leases."""
        self._run(wait_until(self._is_line_served))
        for lease in leases:
            headers = self._headers(lease.holder, self._credentials_of(lease.sandbox_id))
            response = self._run(self.stack.allocate(lease.holder, **headers))
            assert response.status_code == 200, response.text
            assert response.json()["sandbox_id"] == lease.sandbox_id
            self._record(response.json())
            assert response.json() == self._expected_body(lease)

    async def _is_line_served(self) -> bool:
        rows = await self.stack.database.fetch(
            "SELECT holder, name_prefix, command ->> 'sandbox_id' FROM waiting "
            "ORDER BY command ? 'sandbox_id' DESC, waiting_id"
        )
        places = [(place.request.student, place.request.prefix, place.replaces) for place in self.model.line]
        return [tuple(row) for row in rows] == places

    def _record(self, body: dict[str, Any]) -> None:
        self.bodies[body["sandbox_id"]] = body
        self.answered_at[body["sandbox_id"]] = self.model.now

    @precondition(has_sandbox_in("allocated"))
    @rule(data=st.data(), new_holder=st.sampled_from([None, "ada", "grace", "mary"]))
    def claim(self, data: st.DataObject, new_holder: str | None) -> None:
        sandbox_id = self._draw_sandbox(data, self._with_status("allocated"))
        lease = self.model.leases[sandbox_id]
        self._claim(lease.first_holder or lease.holder, sandbox_id, new_holder)

    def _claim(
        self, student: str, sandbox_id: str, new_holder: str | None, credentials: Credentials | None = None
    ) -> None:
        credentials = credentials or self._credentials_of(sandbox_id)
        headers = self._headers(student, credentials) | ({} if new_holder is None else {"X-New-Holder": new_holder})
        response = self._run(
            self.stack.client.post(f"{self.stack.url}/v1/sandboxes/{sandbox_id}/claim", headers=headers)
        )
        if self._is_refused(response, credentials, sandbox_id):
            return
        was_standby = sandbox_id in self.model.leases and self.model.leases[sandbox_id].standby
        try:
            lease = self.model.claim(student, sandbox_id, new_holder)
        except Refused as refused:
            self._assert_refused(response, refused)
            return
        assert response.status_code == 200, response.text
        body = response.json()
        if was_standby:
            assert body["expires_at"] - body["claimed_at"] == 4 * 3600
            self._record(body)
        assert body == self._expected_body(lease)

    @precondition(has_sandbox_in("allocated"))
    @rule(data=st.data(), hours=st.sampled_from([1, 3]), by_administrator=st.booleans())
    def extend(self, data: st.DataObject, hours: int, by_administrator: bool) -> None:
        sandbox_id = self._draw_sandbox(data, self._with_status("allocated"))
        student = None if by_administrator else self.model.leases[sandbox_id].holder
        self._extend(student, sandbox_id, hours)

    def _extend(
        self, student: str | None, sandbox_id: str, hours: int, credentials: Credentials | None = None
    ) -> None:
        credentials = credentials or self._credentials_of(sandbox_id)
        if student is None:
            response = self._admin("POST", f"sandboxes/{sandbox_id}/extend", hours=str(hours), reason="exam")
        else:
            url = f"{self.stack.url}/v1/sandboxes/{sandbox_id}/extend"
            headers = self._headers(student, credentials)
            response = self._run(self.stack.client.post(url, headers=headers, json={"hours": hours}))
        if self._is_refused(response, credentials, sandbox_id):
            return
        try:
            self.model.extend(student, sandbox_id, hours * 60)
        except Refused as refused:
            self._assert_refused(response, refused)
            return
        assert response.status_code == 200, response.text
        expected = self._expected_body(self.model.leases[sandbox_id])
        body = expected | {"expires_at": expected["expires_at"] + hours * 3600}
        assert response.json()["expires_at"] == body["expires_at"]
        self._record(body)

    @precondition(has_sandbox_in("allocated"))
    @rule(data=st.data(), by_administrator=st.booleans(), wait_min=st.none() | WAITS_MIN)
    def replace(self, data: st.DataObject, by_administrator: bool, wait_min: int | None) -> None:
        sandbox_id = self._draw_sandbox(data, self._with_status("allocated"))
        if by_administrator:
            self._replace(None, sandbox_id)
        else:
            self._replace(self.model.leases[sandbox_id].holder, sandbox_id, wait_min)

    def _replace(
        self,
        student: str | None,
        sandbox_id: str,
        wait_min: int | None = None,
        credentials: Credentials | None = None,
    ) -> None:
        credentials = credentials or self._credentials_of(sandbox_id)
        if student is None:
            response = self._admin("POST", f"sandboxes/{sandbox_id}/replace", reason="no DNS")
        else:
            url = f"{self.stack.url}/v1/sandboxes/{sandbox_id}/replace"
            headers = self._headers(student, credentials)
            if wait_min is not None:
                headers["Prefer"] = f"respond-async, wait={wait_min * 60}"
            response = self._run(self.stack.client.post(url, headers=headers, json={"reason": "no DNS"}))
        if self._is_refused(response, credentials, sandbox_id):
            return
        try:
            expected = self.model.replace(student, sandbox_id, wait_min, credentials)
        except Refused as refused:
            self._assert_refused(response, refused)
            return
        body = response.json()
        if isinstance(expected, Waiting):
            assert (response.status_code, body["position"]) == (202, expected.position), response.text
            return
        if isinstance(expected, Lease):
            assert response.status_code == 200, response.text
            assert body == self._expected_body(expected)
            return
        assert response.status_code == 201, response.text
        assert body["sandbox_id"] in expected
        self.model.grant_replacement(sandbox_id, body["sandbox_id"])
        self._record(body)

    @precondition(has_sandbox_in("allocated"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sandbox_id = self._draw_sandbox(data, self._with_status("allocated"))
        self._release(self.model.leases[sandbox_id].holder, sandbox_id)

    def _release(self, student: str, sandbox_id: str, credentials: Credentials | None = None) -> None:
        credentials = credentials or self._credentials_of(sandbox_id)
        url = f"{self.stack.url}/v1/sandboxes/{sandbox_id}/mark-for-deletion"
        response = self._run(self.stack.client.post(url, headers=self._headers(student, credentials)))
        if self._is_refused(response, credentials, sandbox_id):
            return
        try:
            status = self.model.release(student, sandbox_id)
        except Refused as refused:
            self._assert_refused(response, refused)
        else:
            assert response.status_code == 200, response.text
            assert (response.json()["sandbox_id"], response.json()["status"]) == (sandbox_id, status)

    @rule(student=STUDENTS, minutes_ago=st.sampled_from([0, 0, 10, 60]))
    def end_play(self, student: str, minutes_ago: int) -> None:
        response = self._run(self.stack.end_play(student, ended_at=time.time() - minutes_ago * 60))
        outcome = self.model.end_play(student, self.model.now - minutes_ago)
        assert (response.status_code, response.json()) == (200, {"outcome": outcome})

    def _read_sandbox(self, student: str, sandbox_id: str, credentials: Credentials | None = None) -> None:
        credentials = credentials or self._credentials_of(sandbox_id)
        url = f"{self.stack.url}/v1/sandboxes/{sandbox_id}"
        response = self._run(self.stack.client.get(url, headers=self._headers(student, credentials)))
        if self._is_refused(response, credentials, sandbox_id):
            return
        try:
            sandbox, lease = self.model.read_sandbox(student, sandbox_id)
        except Refused as refused:
            self._assert_refused(response, refused)
        else:
            assert response.status_code == 200, response.text
            extra_fields = {"status": sandbox.status, "allocated_to_track": student, "track_name": lease.track}
            body = self._expected_body(lease) | extra_fields
            assert response.json() == {name: body[name] for name in body if name not in ("mode", "claimed_at")}

    # Administrators

    @precondition(has_sandbox_in("allocated"))
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        self._end_lease(self._draw_sandbox(data, self._with_status("allocated")))

    def _end_lease(self, sandbox_id: str) -> None:
        response = self._admin("POST", f"sandboxes/{sandbox_id}/release", reason="class is over")
        try:
            status = self.model.end_lease(sandbox_id)
        except Refused as refused:
            self._assert_refused(response, refused)
        else:
            assert (response.status_code, response.json()["status"]) == (200, status)

    @precondition(has_sandbox_in("deletion_failed"))
    @rule(data=st.data())
    def retry_deletion(self, data: st.DataObject) -> None:
        self._retry_deletion(self._draw_sandbox(data, self._with_status("deletion_failed")))

    @precondition(lambda self: any(sandbox.on_hold for sandbox in self.model.sandboxes.values()))
    @rule(data=st.data())
    def end_hold(self, data: st.DataObject) -> None:
        on_hold = {id for id, sandbox in self.model.sandboxes.items() if sandbox.on_hold}
        self._retry_deletion(self._draw_sandbox(data, on_hold), end_hold=True)

    def _retry_deletion(self, sandbox_id: str, *, end_hold: bool = False) -> None:
        path = f"sandboxes/{sandbox_id}/retry-deletion"
        response = self._admin("POST", path, **({"end_hold": "true"} if end_hold else {}))
        try:
            status = self.model.retry_deletion(sandbox_id, end_hold=end_hold)
        except Refused as refused:
            self._assert_refused(response, refused)
        else:
            assert (response.status_code, response.json()["status"]) == (200, status)

    @rule(name=TOKEN_NAMES, max_active=st.sampled_from([None, 1]))
    def issue_token(self, name: str, max_active: int | None) -> None:
        grant = {"name": name, "role": "track", "tracks": TOKEN_TRACKS, "max_active": max_active}
        url = f"{self.stack.url}/v1/admin/tokens"
        response = self._run(self.stack.client.post(url, headers=ADMIN, json=grant))
        try:
            self.model.issue_token(name, max_active)
        except Refused as refused:
            self._assert_refused(response, refused)
        else:
            assert response.status_code == 201, response.text
            self.tokens.append(response.json()["token"])

    @precondition(lambda self: bool(self.tokens))
    @rule(name=TOKEN_NAMES, change=st.sampled_from(["revoke", "suspend", "resume"]))
    def change_token(self, name: str, change: str) -> None:
        try:
            if change == "revoke":
                self.model.revoke_token(name)
            else:
                self.model.suspend_token(name, suspended=change == "suspend")
        except Refused as refused:
            expected: Refused | None = refused
        else:
            expected = None
        if change == "revoke":
            response = self._admin("DELETE", f"tokens/{name}")
        else:
            response = self._admin("POST", f"tokens/{name}/{change}")
        if expected is not None:
            self._assert_refused(response, expected)
        else:
            assert response.is_success, response.text

    @rule(policies=POLICIES)
    def apply_policies(self, policies: dict[str, Policy]) -> None:
        documents = [
            {
                "name": track,
                "match": {"track_name": track},
                "wait_minutes": policy.wait_min,
                **({} if policy.max_active is None else {"max_active": policy.max_active}),
            }
            for track, policy in policies.items()
        ]
        url = f"{self.stack.url}/v1/admin/policies"
        response = self._run(self.stack.client.put(url, headers=ADMIN, json={"policies": documents}))
        assert response.status_code == 200, response.text
        self.model.policies = policies

    @precondition(has_sandbox_in("deletion_failed", "stale"))
    @rule(status=st.sampled_from(["deletion_failed", "stale"]))
    def bulk_delete(self, status: str) -> None:
        response = self._admin("POST", "bulk-delete", status=status)
        assert (response.status_code, response.json()["deleted"]) == (200, self.model.bulk_delete(status))

    @precondition(has_sandbox_in("stale"))
    @rule(hours=st.sampled_from([0, 1]))
    def delete_stale(self, hours: int) -> None:
        response = self._admin("POST", "auto-delete-stale", grace_period_hours=str(hours))
        assert (response.status_code, response.json()["deleted"]) == (200, self.model.delete_stale(hours * 60))

    @rule(force=st.booleans())
    def sync(self, force: bool) -> None:
        response = self._run(self.stack.sync(force=str(force).lower()))
        try:
            counts = self.model.sync(force=force)
        except Refused as refused:
            self._assert_refused(response, refused)
        else:
            assert response.status_code == 200, response.text
            body = response.json()
            assert {name: body[name] for name in ("synced", "marked_stale", "restored")} == {
                name: counts[name] for name in ("synced", "marked_stale", "restored")
            }

    # Any sandbox in any state, including requests that have no effect

    @rule(student=STUDENTS, number=SANDBOX_NUMBERS)
    def use_any_sandbox(self, student: str, number: int) -> None:
        sandbox_id = self._id(number)
        self._read_sandbox(student, sandbox_id)
        self._claim(student, sandbox_id, None)
        self._release(student, sandbox_id)
        self._extend(student, sandbox_id, 1)
        self._replace(student, sandbox_id)
        self._wait_until_idle()
        self._read_sandbox(student, sandbox_id)

    @rule(number=SANDBOX_NUMBERS)
    def administer_any_sandbox(self, number: int) -> None:
        self._retry_deletion(self._id(number))
        self._wait_until_idle()
        self._end_lease(self._id(number))

    # CSP

    @precondition(lambda self: len(self.accounts) < MAX_SANDBOXES)
    @rule(name_prefix=NAMES)
    def create_account(self, name_prefix: str) -> None:
        (account,) = self._control("POST", "accounts", {"count": 1, "name_prefix": name_prefix})["accounts"]
        self.accounts[str(account["csp_id"])] = account
        self.model.listed[str(account["csp_id"])] = account["name"]

    @precondition(lambda self: bool(self.model.listed))
    @rule(data=st.data())
    def remove_account_from_listing(self, data: st.DataObject) -> None:
        sandbox_id = self._draw_sandbox(data, self.model.listed)
        self._control("DELETE", f"accounts/{self._external_id(sandbox_id)}")
        del self.model.listed[sandbox_id]

    @precondition(lambda self: bool(self.accounts.keys() - self.model.listed.keys()))
    @rule(data=st.data())
    def restore_account(self, data: st.DataObject) -> None:
        """Restore an account to the listing, including one deleted in CSP."""
        sandbox_id = self._draw_sandbox(data, self.accounts.keys() - self.model.listed.keys())
        self._control("POST", "accounts", {"raw": [self.accounts[sandbox_id]]})
        self.model.listed[sandbox_id] = self.accounts[sandbox_id]["name"]

    @precondition(lambda self: bool(self.model.listed))
    @rule(data=st.data(), name_prefix=NAMES)
    def rename_account(self, data: st.DataObject, name_prefix: str) -> None:
        sandbox_id = self._draw_sandbox(data, self.model.listed)
        name = self.accounts[sandbox_id]["name"] = self.model.listed[sandbox_id] = f"{name_prefix}renamed"
        self._control("PATCH", f"accounts/{self._external_id(sandbox_id)}", {"name": name})

    @rule(csp=st.sampled_from(CspState))
    def set_csp_state(self, csp: CspState) -> None:
        self._control("PATCH", "behaviour", CSP_BEHAVIOUR[csp])
        if csp is not CspState.REJECTS_TOKEN and has_sandbox_in("pending_deletion")(self):
            # The reaper would retry postponed deletions later. A clean-up on demand retries them now.
            self._run(wait_until(self._clean_up_succeeds))
        self.model.set_csp_state(csp)

    async def _clean_up_succeeds(self) -> bool:
        return (await self.stack.admin("POST", "cleanup")).status_code == 200

    @rule(html=st.booleans())
    def fail_next_deletion(self, html: bool) -> None:
        """Fail the next deletion. Its retry succeeds."""
        self._control("PATCH", "behaviour", {"fail_next_deletes": 1, "delete_error_html": html})

    # Time

    @rule(minutes=MINUTES)
    def advance_time(self, minutes: int) -> None:
        self._run(self._move_timestamps(timedelta(minutes=minutes)))
        deleted = self.model.advance_time(minutes)
        # The csp-syncer deletes stale sandboxes every hour by itself.
        response = self._admin("POST", "auto-delete-stale")
        assert (response.status_code, response.json()["deleted"]) == (200, deleted)

    async def _move_timestamps(self, time: timedelta) -> None:
        async with self.stack.database.acquire() as connection, connection.transaction():
            for statement in MOVE_TIMESTAMPS:
                await connection.execute(statement, time)

    # Invariants, checked after each step

    @invariant()
    def broker_matches_model(self) -> None:
        self._check_database()
        self._run(self.stack.assert_sound())
        self._check_used_sandboxes()
        self._check_confirmed_leases()
        self._check_statistics()

    def _check_database(self) -> None:
        self._wait_until_idle()
        sandboxes = self._fetch("SELECT sandbox_id, status, name, missing_since IS NOT NULL FROM sandboxes")
        assert sandboxes == {(id, s.status, s.name, s.missing) for id, s in self.model.sandboxes.items()}
        leases = self._fetch(
            "SELECT sandbox_id, holder, first_holder, idempotency_key, end_reason, mode = 'standby', "
            "extended_sec / 60, policy, token, encode(secret_hash, 'hex') FROM leases"
        )
        assert leases == {
            (
                id,
                lease.holder,
                lease.first_holder,
                lease.key,
                lease.end_reason,
                lease.standby,
                lease.extended,
                lease.policy,
                lease.token,
                None if lease.secret is None else hashlib.sha256(lease.secret.encode()).hexdigest(),
            )
            for id, lease in self.model.leases.items()
        }

    def _wait_until_idle(self) -> None:
        """Wait for the background work: expiry of leases, deletions in CSP and the waiting line."""
        leases = self.model.serve_line()  # first, because a replacement leaves a sandbox on hold
        self._run(wait_until(self._is_idle))
        self._read_served_leases(leases)

    async def _is_idle(self) -> bool:
        pending = {id for id, sandbox in self.model.sandboxes.items() if sandbox.status == "pending_deletion"}
        ended = [id for id, lease in self.model.leases.items() if lease.end_reason]
        unfinished = """
            SELECT count(*) FROM sandboxes WHERE status = 'pending_deletion' AND NOT sandbox_id = ANY ($1)
            UNION ALL
            SELECT count(*) FROM leases WHERE ended_at IS NULL AND sandbox_id = ANY ($2)
        """
        return not any(row[0] for row in await self.stack.database.fetch(unfinished, list(pending), ended))

    def _check_used_sandboxes(self) -> None:
        used = "SELECT * FROM sandboxes JOIN leases USING (sandbox_id)"
        assert self._fetch(f"{used} WHERE status IN ('available', 'stale')") == set()

    def _check_confirmed_leases(self) -> None:
        assert {(sandbox_id,) for sandbox_id in self.bodies} <= self._fetch("SELECT sandbox_id FROM leases")

    def _check_statistics(self) -> None:
        stats = self._run(self.stack.stats())
        assert stats["total"] == len(self.model.sandboxes)
        for status in ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted"):
            assert stats[status] == sum(s.status == status for s in self.model.sandboxes.values()), status

    def teardown(self) -> None:
        ended = {self._external_id(id) for id, lease in self.model.leases.items() if lease.end_reason}
        deleted = {call["path"].rsplit("/", 1)[1] for call in self._run(self.stack.deletions())}
        assert deleted <= ended
        assert not deleted & {
            self._external_id(id) for id, sandbox in self.model.sandboxes.items() if sandbox.on_hold
        }

    def _id(self, number: int) -> str:
        return list(self.accounts)[number] if number < len(self.accounts) else "no-such-sandbox"

    def _draw_sandbox(self, data: st.DataObject, sandbox_ids: Collection[str]) -> str:
        """Draw by number, because numbers are the same in each replay of a sequence and ids are not."""
        numbers = [number for number, sandbox_id in enumerate(self.accounts) if sandbox_id in sandbox_ids]
        return self._id(data.draw(st.sampled_from(numbers), label="number"))

    def _with_status(self, status: str) -> set[str]:
        return {id for id, sandbox in self.model.sandboxes.items() if sandbox.status == status}

    def _expected_body(self, lease: Lease) -> dict[str, Any]:
        """Return the body of the lease's last changing response, with its timestamps moved into the past."""
        original = self.bodies[lease.sandbox_id]
        ago_sec = (self.model.now - self.answered_at[lease.sandbox_id]) * 60
        body = {
            "sandbox_id": lease.sandbox_id,
            "name": self.model.sandboxes[lease.sandbox_id].name,
            "external_id": self._external_id(lease.sandbox_id),
            "allocated_at": original["allocated_at"] - ago_sec,
            "expires_at": original["expires_at"] - ago_sec,
            "sfdc_account_id": original["sfdc_account_id"],
        }
        if lease.standby or lease.claimed is not None:
            claimed_at = None if lease.standby else original["claimed_at"] - ago_sec
            body |= {"mode": "standby" if lease.standby else "active", "claimed_at": claimed_at}
        return body

    def _external_id(self, sandbox_id: str) -> str:
        external_id: str = self.accounts[sandbox_id]["id"].rsplit("/", 1)[1]
        return external_id

    def _assert_refused(self, response: httpx.Response, refused: Refused) -> None:
        assert response.status_code == refused.status, response.text
        assert response.json()["detail"]["code"] == refused.code

    def _admin(self, method: str, path: str, **parameters: str) -> httpx.Response:
        return self._run(self.stack.admin(method, path, **parameters))

    def _control(self, method: str, path: str, body: Any = None) -> Any:
        return self._run(self.stack.control(method, path, body))

    def _fetch(self, query: str) -> set[tuple[Any, ...]]:
        return {tuple(row) for row in self._run(self.stack.database.fetch(query))}

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


@pytest.mark.timeout(hypothesis_settings.TIMEOUT_SEC)
async def test_the_broker_matches_the_model(own_stack: Stack) -> None:
    BrokerMachine.stack, BrokerMachine.loop = own_stack, asyncio.get_running_loop()
    machine = hypothesis_settings.with_seed(BrokerMachine)
    await asyncio.to_thread(
        run_state_machine_as_test, machine, settings=hypothesis_settings.build_settings(SEQUENCES, STEPS)
    )
