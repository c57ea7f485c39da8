"""Logins inside sandboxes: created and removed in the CSP simulator, with a stand-in for the allocator."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aio_pika
import pytest
from aio_pika.abc import AbstractIncomingMessage
from cryptography.fernet import Fernet
from pydantic import ValidationError

from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD
from devstack.conditions import wait_until
from devstack.testing import empty_queues
from provisioner import access, access_runs
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import InvalidCommand, ReplyEnvelope, decode_commands
from sandbox_broker.contract.commands import (
    ClaimAccess,
    Command,
    RecordAccess,
    RecordAccessFailure,
    RecordAccessRemoval,
)
from sandbox_broker.contract.replies import AccessClaimed, DueAccess, Recorded, Reply
from sandbox_broker.runtime.access_keys import AccessKeys

from .provisioner_harness import REFUSED, Csp, announce, provisioning, sample, settings, simulated_csp

KEY = Fernet.generate_key().decode()
PASSWORD = "Abcdef12!?-secret"
EMAIL = "ann@labs.example.com"
ON = {
    "stock_enabled": False,
    "csp_login_email": DEFAULT_EMAIL,
    "csp_login_password": DEFAULT_PASSWORD,
    "access_keys": KEY,
    "access_email_domain": "labs.example.com",
    "access_attempt_timeout_sec": 5,
    "circuit_breaker_timeout_sec": 0.2,
}


@dataclass
class Allocator:
    """Holds due logins, and records commands. A failed login is due again at once."""

    due: dict[str, DueAccess] = field(default_factory=dict)
    claimed: set[str] = field(default_factory=set)
    received: list[Command] = field(default_factory=list)
    envelopes: int = 0
    ignores_envelopes: int = 0
    """Envelopes that get no reply and have no effect."""
    refuses_records: bool = False
    loses_records: bool = False
    most_claimed: int = 0

    def add(self, external_id: str, **changes: Any) -> None:
        values: dict[str, Any] = {
            "sandbox_id": external_id[-4:],
            "external_id": external_id,
            "claim_id": uuid.uuid4(),
            "email": EMAIL,
            "groups": ("user",),
            "password": AccessKeys(KEY).encrypt(PASSWORD),
            "attempts": 0,
            "waiting_sec": 1.0,
        }
        due = DueAccess.model_validate(values | changes)
        self.due[due.sandbox_id] = due

    def all(self, kind: type[Any]) -> list[Any]:
        return [command for command in self.received if isinstance(command, kind)]

    def answer(self, command: Command) -> Reply:
        self.received.append(command)
        if isinstance(command, ClaimAccess):
            free = [key for key in self.due if key not in self.claimed][: command.limit]
            self.claimed.update(free)
            self.most_claimed = max(self.most_claimed, len(self.claimed))
            return AccessClaimed(logins=tuple(self.due[key] for key in free), next_in_sec=None if free else 3600)
        if self.refuses_records:
            return REFUSED
        if isinstance(command, RecordAccess | RecordAccessRemoval):
            self.claimed.discard(command.sandbox_id)
            if not self.loses_records:
                del self.due[command.sandbox_id]
        elif isinstance(command, RecordAccessFailure):
            self.claimed.discard(command.sandbox_id)
        return Recorded(changed=True)

    @asynccontextmanager
    async def consuming(self, amqp_url: str) -> AsyncIterator[None]:
        connection = await aio_pika.connect(amqp_url)
        async with connection, connection.channel() as channel:
            replies_exchange = await channel.get_exchange(topology.REPLIES.name, ensure=False)

            async def handle(message: AbstractIncomingMessage) -> None:
                await message.ack()
                self.envelopes += 1
                if self.ignores_envelopes:
                    self.ignores_envelopes -= 1
                    return
                commands = [c for c in decode_commands(message.body) if not isinstance(c, InvalidCommand)]
                replies = tuple(map(self.answer, commands))
                body = ReplyEnvelope(replies=replies).model_dump_json().encode()
                reply = aio_pika.Message(body, correlation_id=message.correlation_id)
                await replies_exchange.publish(reply, message.reply_to or "", mandatory=False)

            await (await channel.get_queue(topology.ALLOCATOR_MAINTENANCE.name)).consume(handle)
            yield


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp() as csp:
        await csp.control.post("/_control/accounts", json={"count": 8, "name_prefix": "lab-"})
        yield csp


@pytest.fixture
async def allocator(amqp_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Allocator]:
    monkeypatch.setattr(access_runs, "MIN_PAUSE_SEC", 0.05)
    await empty_queues(amqp_url)
    allocator = Allocator()
    async with allocator.consuming(amqp_url):
        yield allocator


async def users(csp: Csp) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = (await csp.control.get("/_control/users")).json()["users"]
    return records


async def can_sign_in(csp: Csp, password: str = PASSWORD) -> bool:
    body = {"email": EMAIL, "password": password}
    return (await csp.control.post("/v2/session/users/sign_in", json=body)).status_code == 200


async def test_a_login_is_created_and_then_removed(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    external_id = await csp.external_id("lab-1")
    allocator.add(external_id, groups=("user", "act_admin"))
    async with provisioning(amqp_url, csp, **ON):
        await wait_until(lambda: not allocator.due)
        (user,) = await users(csp)
        assert (user["account"], user["email"], user["groups"]) == (external_id, EMAIL, ["user", "act_admin"])
        assert await can_sign_in(csp)
        (record,) = allocator.all(RecordAccess)
        assert record.user_id == user["id"]
        allocator.add(external_id, remove=True, password=None, user_id=user["id"])
        await announce(amqp_url, "access.ended")
        await wait_until(lambda: not allocator.due)
    assert await users(csp) == []
    assert len(allocator.all(RecordAccessRemoval)) == 1
    assert len(await csp.calls("DELETE")) == 1


async def test_an_attempt_after_a_dead_one_ends_with_the_same_user(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    allocator.add(await csp.external_id("lab-1"))
    allocator.loses_records = True
    async with provisioning(amqp_url, csp, **ON):
        await wait_until(lambda: len(allocator.all(RecordAccess)) >= 3)
        allocator.loses_records = False
        await wait_until(lambda: not allocator.due)
    (user,) = await users(csp)
    assert {record.user_id for record in allocator.all(RecordAccess)} == {user["id"]}
    assert await can_sign_in(csp)


@pytest.mark.parametrize(
    "operation",
    ["group_listings", "user_creates", "user_passwords", "current_users", "account_switches", "sign_ins"],
)
@pytest.mark.parametrize("after_effect", [False, True])
async def test_a_failed_step_is_repeated(
    csp: Csp, allocator: Allocator, amqp_url: str, operation: str, after_effect: bool
) -> None:
    await csp.behave(
        **{f"fail_next_{operation}": 2},
        user_create_error_after_effect=after_effect,
        user_password_error_after_effect=after_effect,
    )
    allocator.add(await csp.external_id("lab-1"))
    async with provisioning(amqp_url, csp, **ON):
        await wait_until(lambda: not allocator.due)
    assert len(await users(csp)) == 1
    assert await can_sign_in(csp)
    failures = allocator.all(RecordAccessFailure)
    assert len(failures) == 2
    assert not any(failure.failed for failure in failures)


async def test_a_removal_without_a_recorded_user_finds_it_by_its_email(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    first, second = await csp.external_id("lab-1"), await csp.external_id("lab-2")
    for external_id in (first, second):
        allocator.add(external_id)
    async with provisioning(amqp_url, csp, **ON):
        await wait_until(lambda: not allocator.due)
        allocator.add(first, remove=True, password=None)
        await announce(amqp_url, "access.ended")
        await wait_until(lambda: not allocator.due)
        assert [user["account"] for user in await users(csp)] == [second]
        allocator.add(first, remove=True, password=None)  # no user is left
        await announce(amqp_url, "access.ended")
        await wait_until(lambda: not allocator.due)
    assert [user["account"] for user in await users(csp)] == [second]


async def test_a_switch_that_fails_is_no_failure_of_csp(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(account_switch_ready_after_sec=0.5)
    for number in range(1, 9):
        allocator.add(await csp.external_id(f"lab-{number}"))
    async with provisioning(amqp_url, csp, access_concurrency=3, **ON):
        await wait_until(lambda: not allocator.due)
        assert sample("broker_access_circuit_state") == 0
    assert len(await users(csp)) == 8
    assert allocator.most_claimed <= 3
    sign_ins = [call for call in await csp.calls("POST") if call["path"].endswith("sign_in")]
    assert len(sign_ins) <= 3
    failures = allocator.all(RecordAccessFailure)
    assert failures
    assert not any(failure.failed for failure in failures)
    assert all(0 < failure.retry_in_sec <= access.RETRY_SEC for failure in failures)


async def test_a_login_costs_one_envelope_and_five_calls(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    for number in range(1, 9):
        allocator.add(await csp.external_id(f"lab-{number}"))
    async with provisioning(amqp_url, csp, access_concurrency=3, **ON):
        await wait_until(lambda: not allocator.due)
    # The first claim, a second one after the first tick, and one for the end of each attempt at most.
    assert allocator.envelopes <= 2 + 8
    calls = [call["path"].rpartition("/")[2] for call in [*await csp.calls("POST"), *await csp.calls("GET")]]
    assert calls.count("sign_in") <= 3
    steps = ("account_switch", "current_user", "groups", "users", "password")
    assert [calls.count(step) for step in steps] == [8] * 5
    assert len(calls) == 5 * 8 + calls.count("sign_in")


async def test_a_record_without_a_reply_is_sent_again(
    csp: Csp, allocator: Allocator, amqp_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(access_runs, "CLAIM_TIMEOUT_SEC", 1)
    monkeypatch.setattr(access_runs, "NO_REPLY_PAUSE_SEC", 0.1)
    await csp.behave(user_password_latency_sec=0.5)
    allocator.add(await csp.external_id("lab-1"))
    async with provisioning(amqp_url, csp, access_concurrency=1, **ON):
        await wait_until(lambda: allocator.claimed)
        allocator.ignores_envelopes = 2
        await wait_until(lambda: not allocator.due)
    assert allocator.ignores_envelopes == 0
    assert len(allocator.all(RecordAccess)) == 1
    passwords = [call for call in await csp.calls("POST") if call["path"].endswith("password")]
    assert len(passwords) == 1


async def test_a_refused_record_is_dropped(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.refuses_records = True
    allocator.add(await csp.external_id("lab-1"))
    async with provisioning(amqp_url, csp, **ON):
        await wait_until(lambda: allocator.claimed)
        await wait_until(lambda: sample("broker_access_running") == 0)
        allocator.refuses_records = False
        allocator.claimed.clear()  # as if its claim had ended
        await announce(amqp_url)
        await wait_until(lambda: not allocator.due)
    assert len(await users(csp)) == 1


async def test_a_late_login_counts_as_failed(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(account_switch_ready_after_sec=3600)
    allocator.add(await csp.external_id("lab-1"), waiting_sec=601.0)
    async with provisioning(amqp_url, csp, **ON):
        await wait_until(lambda: allocator.all(RecordAccessFailure))
    failure = allocator.all(RecordAccessFailure)[0]
    assert failure.failed
    assert failure.error.startswith("CSP has not let the broker into the account for 601 s")


async def test_a_wrong_password_costs_one_sign_in_and_recovers(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(reject_sign_ins=True)
    for number in range(1, 6):
        allocator.add(await csp.external_id(f"lab-{number}"))
    async with provisioning(amqp_url, csp, **{**ON, "circuit_breaker_timeout_sec": 1}):
        await wait_until(lambda: len(allocator.all(RecordAccessFailure)) >= 20)
        failures = allocator.all(RecordAccessFailure)
        assert {(failure.error, failure.failed) for failure in failures} == {(access.SIGN_IN_REFUSED, True)}
        sign_ins = [call for call in await csp.calls("POST") if call["path"].endswith("sign_in")]
        assert len(sign_ins) < len(failures) / 2
        assert sample("broker_access_sign_in_refused") == 1
        await csp.behave(reject_sign_ins=False)
        await wait_until(lambda: not allocator.due)
        assert sample("broker_access_sign_in_refused") == 0
    assert len(await users(csp)) == 5


async def test_an_expired_session_is_replaced(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with provisioning(amqp_url, csp, **ON):
        for number in range(1, 4):
            await csp.behave(jwt_lifetime_sec=0.5)
            allocator.add(await csp.external_id(f"lab-{number}"))
            await announce(amqp_url)
            await wait_until(lambda: not allocator.due)
            body = {"email": DEFAULT_EMAIL, "password": DEFAULT_PASSWORD}
            jwt = (await csp.control.post("/v2/session/users/sign_in", json=body)).json()["jwt"]
            await wait_until(partial(has_expired, csp, jwt))  # so have all earlier ones
    assert len(await users(csp)) == 3


async def has_expired(csp: Csp, jwt: str) -> bool:
    response = await csp.control.get("/v2/current_user", headers={"Authorization": f"Bearer {jwt}"})
    return response.status_code == 401


async def test_an_unknown_group_is_named(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.add(await csp.external_id("lab-1"), groups=("user", "gods"))
    async with provisioning(amqp_url, csp, **ON):
        await wait_until(lambda: allocator.all(RecordAccessFailure))
    failure = allocator.all(RecordAccessFailure)[0]
    assert failure.failed
    assert failure.error == "The account has no group gods. Its groups are: act_admin, user."
    assert await users(csp) == []


async def test_an_unknown_key_is_a_failure_with_a_reason(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.add(await csp.external_id("lab-1"), password=AccessKeys(Fernet.generate_key().decode()).encrypt("x"))
    async with provisioning(amqp_url, csp, **ON):
        await wait_until(lambda: allocator.all(RecordAccessFailure))
    assert allocator.all(RecordAccessFailure)[0].error == access.KEY_UNKNOWN
    assert await users(csp) == []


async def test_the_circuit_breaker_stops_calls_while_csp_fails(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(group_listing_error_rate=1)
    allocator.add(await csp.external_id("lab-1"))
    changes = {**ON, "circuit_breaker_threshold": 2, "circuit_breaker_timeout_sec": 3600}
    async with provisioning(amqp_url, csp, **changes):
        await wait_until(lambda: sample("broker_access_circuit_state") == 2)
        await csp.control.request("DELETE", "/_control/calls")
        await announce(amqp_url)
        await wait_until(lambda: sample("broker_access_running") == 0)
        assert await csp.calls("POST") == []


async def test_without_an_administrator_no_login_is_claimed(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.add(await csp.external_id("lab-1"))
    async with provisioning(amqp_url, csp, stock_enabled=True):
        await wait_until(lambda: allocator.received)
    assert allocator.all(ClaimAccess) == []


@pytest.mark.parametrize("missing", ["csp_login_password", "access_keys", "access_email_domain"])
def test_logins_need_all_settings(missing: str) -> None:
    with pytest.raises(ValidationError, match=missing.upper()):
        settings(**{**ON, missing: ""})
    assert settings(**ON).has_access
    assert not settings().has_access


@pytest.mark.parametrize("domain", ["labs", "labs..example", "@labs.example.com"])
def test_an_invalid_domain_is_refused(domain: str) -> None:
    with pytest.raises(ValidationError):
        settings(**{**ON, "access_email_domain": domain})
