"""The running broker beside the model of it: whatever they are asked, in whatever order, they agree. Where they do
not, what is shown is the shortest story found that tells them apart."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Coroutine
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

from devstack.testing import NewDatabase, NewVhost
from tests.integration import search
from tests.integration.model import Csp, Lease, Model, Refused
from tests.integration.stack import Stack, eventually, running, track

STORIES, STEPS = 12, 40

MAX_SANDBOXES = 9
STUDENTS = st.sampled_from(["ada", "grace", "alan"])
KEYS = st.sampled_from([None, None, "k1", "k2"])
NAMES = st.sampled_from(["lab-a-", "lab-b-", "lab_a-"])
PREFIXES = st.sampled_from([None, None, "lab-a-", "lab-b", "lab_", "LAB-A-", "lab-a-1", "%"])
ANY_ONE = st.integers(0, MAX_SANDBOXES)
"""The number of a sandbox, in the order in which CSP has made them; the last one there is not."""
MINUTES = st.sampled_from([10, 60, 4 * 60, 24 * 60])

MOODS: dict[Csp, dict[str, Any]] = {
    Csp.WORKS: {"delete_error_rate": 0, "reject_tokens": False, "fail_next_deletes": 0},
    Csp.REFUSES: {"delete_error_rate": 1, "reject_tokens": False},
    Csp.LOCKED: {"delete_error_rate": 0, "reject_tokens": True},
}

# A lease ends and a deletion is done within a moment; nothing else begins by itself, and nobody gives up waiting.
SETTINGS = {
    "ADMIN_WAIT_SEC": "60",
    "ALLOCATE_TIMEOUT_SEC": "60",
    "AUTO_EXPIRY_INTERVAL_SEC": "0.2",
    "CLEANUP_INTERVAL_SEC": "1",
    "CIRCUIT_BREAKER_THRESHOLD": "1000000",
    "CIRCUIT_BREAKER_TIMEOUT_SEC": "0.1",
    "DELETION_BACKOFF_BASE_SEC": "0.05",
    "DELETION_MAX_ATTEMPTS": "2",
    "RECORD_RETENTION_DAYS": "3650",
    "SYNC_INTERVAL_SEC": "864000",
}

# That time has passed is the same as that all has happened earlier.
EARLIER = (
    """UPDATE leases SET allocated_at = allocated_at - $1::interval, expires_at = expires_at - $1::interval,
        ended_at = ended_at - $1::interval""",
    """UPDATE sandboxes SET status_since = status_since - $1::interval, deleted_at = deleted_at - $1::interval,
        missing_since = missing_since - $1::interval, deletion_due_at = deletion_due_at - $1::interval,
        deletion_requested_at = deletion_requested_at - $1::interval""",
    """UPDATE csp_listings SET begun_at = begun_at - $1::interval, applied_at = applied_at - $1::interval,
        held_at = held_at - $1::interval""",
)

T = TypeVar("T")


def some(*statuses: str) -> Callable[["Broker"], bool]:
    """A step is worth taking only where a sandbox is in one of these states."""
    return lambda broker: any(sandbox.status in statuses for sandbox in broker.model.sandboxes.values())


@pytest.fixture
async def own_stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        running(database_url, amqp_url, settings=SETTINGS) as stack,
    ):
        yield stack


class Broker(RuleBasedStateMachine):
    """Does each thing twice, to the model and to the stack, and compares. It runs in a thread of its own; what it
    asks of the stack runs in the loop of the tests."""

    stack: Stack
    loop: asyncio.AbstractEventLoop

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        self.accounts: dict[str, dict[str, Any]] = {}
        """All that CSP ever had, by sandbox."""
        self.bodies: dict[str, dict[str, Any]] = {}
        """What the students were answered, by sandbox."""

    @initialize(csp=st.sampled_from(Csp))
    def begin(self, csp: Csp) -> None:
        self._run(self.stack.fill(0))
        for name_prefix, count in (("lab-a-", 4), ("lab-b-", 2)):
            for _ in range(count):
                self.csp_makes(name_prefix)
        self.sync(force=False)
        self.csp_becomes(csp)

    # Students

    @rule(student=STUDENTS)
    def allocate(self, student: str) -> None:
        self._allocate(student, None, None)

    @rule(student=STUDENTS, prefix=PREFIXES, key=KEYS)
    def allocate_with(self, student: str, prefix: str | None, key: str | None) -> None:
        self._allocate(student, prefix, key)

    def _allocate(self, student: str, prefix: str | None, key: str | None) -> None:
        headers = {"X-Sandbox-Name-Prefix": prefix, "Idempotency-Key": key}
        answer = self._run(
            self.stack.allocate(student, **{name: value for name, value in headers.items() if value is not None})
        )
        try:
            expected = self.model.allocate(student, prefix, key)
        except Refused as refused:
            self._is_refused(answer, refused)
            return
        if isinstance(expected, Lease):
            assert answer.status_code == 200, answer.text
            assert answer.json() == self._body(expected)
        else:
            assert answer.status_code == 201, answer.text
            body = answer.json()
            assert body["sandbox_id"] in expected
            assert body["expires_at"] - body["allocated_at"] == 4 * 3600
            self.bodies[body["sandbox_id"]] = body
            lease = self.model.grant(student, body["sandbox_id"], key)
            assert body == self._body(lease)

    @precondition(some("allocated"))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        sandbox_id = self._one(data, self._in_state("allocated"))
        self._release(self.model.leases[sandbox_id].holder, sandbox_id)

    def _release(self, student: str, sandbox_id: str) -> None:
        answer = self._run(self.stack.release(sandbox_id, student))
        try:
            status = self.model.release(student, sandbox_id)
        except Refused as refused:
            self._is_refused(answer, refused)
        else:
            assert answer.status_code == 200, answer.text
            assert (answer.json()["sandbox_id"], answer.json()["status"]) == (sandbox_id, status)

    def _look(self, student: str, sandbox_id: str) -> None:
        url = f"{self.stack.url}/v1/sandboxes/{sandbox_id}"
        answer = self._run(self.stack.client.get(url, headers=track(student)))
        try:
            sandbox, lease = self.model.look(student, sandbox_id)
        except Refused as refused:
            self._is_refused(answer, refused)
        else:
            assert answer.status_code == 200, answer.text
            more = {"status": sandbox.status, "allocated_to_track": student, "track_name": None}
            assert answer.json() == self._body(lease) | more

    # Administrators

    @precondition(some("allocated"))
    @rule(data=st.data())
    def end_lease(self, data: st.DataObject) -> None:
        self._end_lease(self._one(data, self._in_state("allocated")))

    def _end_lease(self, sandbox_id: str) -> None:
        answer = self._admin("POST", f"sandboxes/{sandbox_id}/release", reason="class is over")
        try:
            status = self.model.end_lease(sandbox_id)
        except Refused as refused:
            self._is_refused(answer, refused)
        else:
            assert (answer.status_code, answer.json()["status"]) == (200, status)

    @precondition(some("deletion_failed"))
    @rule(data=st.data())
    def retry_deletion(self, data: st.DataObject) -> None:
        self._retry_deletion(self._one(data, self._in_state("deletion_failed")))

    def _retry_deletion(self, sandbox_id: str) -> None:
        answer = self._admin("POST", f"sandboxes/{sandbox_id}/retry-deletion")
        try:
            status = self.model.retry_deletion(sandbox_id)
        except Refused as refused:
            self._is_refused(answer, refused)
        else:
            assert (answer.status_code, answer.json()["status"]) == (200, status)

    @precondition(some("deletion_failed", "stale"))
    @rule(status=st.sampled_from(["deletion_failed", "stale"]))
    def bulk_delete(self, status: str) -> None:
        answer = self._admin("POST", "bulk-delete", status=status)
        assert (answer.status_code, answer.json()["deleted"]) == (200, self.model.bulk_delete(status))

    @precondition(some("stale"))
    @rule(hours=st.sampled_from([0, 1]))
    def delete_stale(self, hours: int) -> None:
        answer = self._admin("POST", "auto-delete-stale", grace_period_hours=str(hours))
        assert (answer.status_code, answer.json()["deleted"]) == (200, self.model.delete_stale(hours * 60))

    @rule(force=st.booleans())
    def sync(self, force: bool) -> None:
        answer = self._run(self.stack.sync(force=str(force).lower()))
        try:
            counts = self.model.sync(force=force)
        except Refused as refused:
            self._is_refused(answer, refused)
        else:
            assert answer.status_code == 200, answer.text
            body = answer.json()
            assert {name: body[name] for name in ("synced", "marked_stale", "restored")} == {
                name: counts[name] for name in ("synced", "marked_stale", "restored")
            }

    # Anybody, about a sandbox in whatever state, also where there is nothing to be done

    @rule(student=STUDENTS, number=ANY_ONE)
    def ask_about_any(self, student: str, number: int) -> None:
        sandbox_id = self._id(number)
        self._look(student, sandbox_id)
        self._release(student, sandbox_id)
        self._come_to_rest()
        self._look(student, sandbox_id)

    @rule(number=ANY_ONE)
    def administer_any(self, number: int) -> None:
        self._retry_deletion(self._id(number))
        self._come_to_rest()
        self._end_lease(self._id(number))

    # CSP

    @precondition(lambda self: len(self.accounts) < MAX_SANDBOXES)
    @rule(name_prefix=NAMES)
    def csp_makes(self, name_prefix: str) -> None:
        (account,) = self._control("POST", "accounts", {"count": 1, "name_prefix": name_prefix})["accounts"]
        self.accounts[str(account["csp_id"])] = account
        self.model.listed[str(account["csp_id"])] = account["name"]

    @precondition(lambda self: bool(self.model.listed))
    @rule(data=st.data())
    def csp_loses(self, data: st.DataObject) -> None:
        sandbox_id = self._one(data, self.model.listed)
        self._control("DELETE", f"accounts/{self._external_id(sandbox_id)}")
        del self.model.listed[sandbox_id]

    @precondition(lambda self: bool(self.accounts.keys() - self.model.listed.keys()))
    @rule(data=st.data())
    def csp_finds_again(self, data: st.DataObject) -> None:
        """Also what it has deleted."""
        sandbox_id = self._one(data, self.accounts.keys() - self.model.listed.keys())
        self._control("POST", "accounts", {"raw": [self.accounts[sandbox_id]]})
        self.model.listed[sandbox_id] = self.accounts[sandbox_id]["name"]

    @precondition(lambda self: bool(self.model.listed))
    @rule(data=st.data(), name_prefix=NAMES)
    def csp_renames(self, data: st.DataObject, name_prefix: str) -> None:
        sandbox_id = self._one(data, self.model.listed)
        name = self.accounts[sandbox_id]["name"] = self.model.listed[sandbox_id] = f"{name_prefix}renamed"
        self._control("PATCH", f"accounts/{self._external_id(sandbox_id)}", {"name": name})

    @rule(csp=st.sampled_from(Csp))
    def csp_becomes(self, csp: Csp) -> None:
        self._control("PATCH", "behaviour", MOODS[csp])
        if csp is not Csp.LOCKED and some("pending_deletion")(self):
            # What CSP did not let us delete is tried again later; or now, if somebody asks for it.
            self._run(eventually(self._cleaned_up))
        self.model.csp_becomes(csp)

    async def _cleaned_up(self) -> bool:
        return (await self.stack.admin("POST", "cleanup")).status_code == 200

    @rule(html=st.booleans())
    def csp_stumbles(self, html: bool) -> None:
        """The next deletion fails, and succeeds when it is repeated."""
        self._control("PATCH", "behaviour", {"fail_next_deletes": 1, "delete_error_html": html})

    # Time

    @rule(minutes=MINUTES)
    def time_passes(self, minutes: int) -> None:
        self._run(self._let_pass(timedelta(minutes=minutes)))
        over = self.model.later(minutes)
        # What the syncer does by itself in the course of an hour.
        answer = self._admin("POST", "auto-delete-stale")
        assert (answer.status_code, answer.json()["deleted"]) == (200, over)

    async def _let_pass(self, time: timedelta) -> None:
        async with self.stack.database.acquire() as connection, connection.transaction():
            for statement in EARLIER:
                await connection.execute(statement, time)

    # What must hold after each step

    @invariant()
    def they_agree(self) -> None:
        self._the_database_is_as_the_model_says()
        self._run(self.stack.assert_sound())
        self._what_was_used_never_comes_back()
        self._each_lease_that_was_answered_is_there()
        self._the_statistics_count_what_there_is()

    def _the_database_is_as_the_model_says(self) -> None:
        self._come_to_rest()
        sandboxes = self._fetch("SELECT sandbox_id, status, name, missing_since IS NOT NULL FROM sandboxes")
        assert sandboxes == {(id, s.status, s.name, s.missing) for id, s in self.model.sandboxes.items()}
        leases = self._fetch("SELECT sandbox_id, holder, idempotency_key, end_reason FROM leases")
        assert leases == {(id, lease.holder, lease.key, lease.ended) for id, lease in self.model.leases.items()}

    def _come_to_rest(self) -> None:
        """What goes on by itself is done: leases end, sandboxes are deleted."""
        self._run(eventually(self._is_at_rest))

    async def _is_at_rest(self) -> bool:
        pending = {id for id, sandbox in self.model.sandboxes.items() if sandbox.status == "pending_deletion"}
        ended = [id for id, lease in self.model.leases.items() if lease.ended]
        under_way = """
            SELECT count(*) FROM sandboxes WHERE status = 'pending_deletion' AND NOT sandbox_id = ANY ($1)
            UNION ALL
            SELECT count(*) FROM leases WHERE ended_at IS NULL AND sandbox_id = ANY ($2)
        """
        return not any(row[0] for row in await self.stack.database.fetch(under_way, list(pending), ended))

    def _what_was_used_never_comes_back(self) -> None:
        used = "SELECT * FROM sandboxes JOIN leases USING (sandbox_id)"
        assert self._fetch(f"{used} WHERE status IN ('available', 'stale')") == set()

    def _each_lease_that_was_answered_is_there(self) -> None:
        assert {(sandbox_id,) for sandbox_id in self.bodies} <= self._fetch("SELECT sandbox_id FROM leases")

    def _the_statistics_count_what_there_is(self) -> None:
        stats = self._run(self.stack.stats())
        assert stats["total"] == len(self.model.sandboxes)
        for status in ("available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted"):
            assert stats[status] == sum(s.status == status for s in self.model.sandboxes.values()), status

    def teardown(self) -> None:
        over = {self._external_id(id) for id, lease in self.model.leases.items() if lease.ended}
        deleted = {call["path"].rsplit("/", 1)[1] for call in self._run(self.stack.deletions())}
        assert deleted <= over

    def _id(self, number: int) -> str:
        return list(self.accounts)[number] if number < len(self.accounts) else "no-such-sandbox"

    def _one(self, data: st.DataObject, of_them: Collection[str]) -> str:
        """By its number, which is the same each time a story is told; its id is not."""
        numbers = [number for number, sandbox_id in enumerate(self.accounts) if sandbox_id in of_them]
        return self._id(data.draw(st.sampled_from(numbers), label="number"))

    def _in_state(self, status: str) -> set[str]:
        return {id for id, sandbox in self.model.sandboxes.items() if sandbox.status == status}

    def _body(self, lease: Lease) -> dict[str, Any]:
        """What the student was answered, as it must read by now."""
        first = self.bodies[lease.sandbox_id]
        ago_sec = (self.model.now - lease.begun) * 60
        return {
            "sandbox_id": lease.sandbox_id,
            "name": self.model.sandboxes[lease.sandbox_id].name,
            "external_id": self._external_id(lease.sandbox_id),
            "allocated_at": first["allocated_at"] - ago_sec,
            "expires_at": first["expires_at"] - ago_sec,
            "sfdc_account_id": first["sfdc_account_id"],
        }

    def _external_id(self, sandbox_id: str) -> str:
        external_id: str = self.accounts[sandbox_id]["id"].rsplit("/", 1)[1]
        return external_id

    def _is_refused(self, answer: httpx.Response, refused: Refused) -> None:
        assert answer.status_code == refused.status, answer.text
        assert answer.json()["detail"]["code"] == refused.code

    def _admin(self, method: str, path: str, **parameters: str) -> httpx.Response:
        return self._run(self.stack.admin(method, path, **parameters))

    def _control(self, method: str, path: str, body: Any = None) -> Any:
        return self._run(self.stack.control(method, path, body))

    def _fetch(self, query: str) -> set[tuple[Any, ...]]:
        return {tuple(row) for row in self._run(self.stack.database.fetch(query))}

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()


@pytest.mark.timeout(search.TIMEOUT_SEC)
async def test_the_broker_does_what_the_model_does(own_stack: Stack) -> None:
    Broker.stack, Broker.loop = own_stack, asyncio.get_running_loop()
    machine = search.seeded(Broker)
    await asyncio.to_thread(run_state_machine_as_test, machine, settings=search.effort(STORIES, STEPS))
