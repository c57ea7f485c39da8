"""Tests of creation.py: one attempt in CSP, and its record."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator

import pytest

from csp_simulator.app import DEFAULT_TOKEN
from devstack.conditions import wait_until
from devstack.testing import empty_queues
from provisioner.creation import Creator
from sandbox_broker.contract.commands import ClaimCreations, RecordCreation, RecordCreationFailure
from sandbox_broker.contract.replies import DueCreation
from sandbox_broker.csp.circuit_breaker import CspCircuit
from sandbox_broker.csp.client import CspClient
from sandbox_broker.messaging.maintenance_client import MaintenanceClient
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient

from .provisioner_harness import Allocator, Csp, announce, provisioning, sample, settings, simulated_csp


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp() as csp:
        yield csp


@pytest.fixture
async def allocator(amqp_url: str) -> AsyncIterator[Allocator]:
    await empty_queues(amqp_url)
    allocator = Allocator()
    async with allocator.consuming(amqp_url):
        yield allocator


async def test_a_due_account_is_created_and_then_recorded(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.add(3, admin_user={"email": "admin@example.com", "name": "Admin"})
    before = sample("broker_stock_accounts_created_total")
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: len(allocator.created) == 3)
    assert sorted(await csp.names()) == ["lab-1", "lab-2", "lab-3"]
    assert allocator.created == {name: await csp.external_id(name) for name in await csp.names()}
    assert await csp.calls("GET") == [], "a first attempt needs no look-up"
    assert sample("broker_stock_accounts_created_total") == before + 3
    assert allocator.invalid == []


@pytest.mark.parametrize("in_csp", [True, False])
async def test_a_creation_that_was_claimed_before_is_looked_up_first(
    csp: Csp, allocator: Allocator, amqp_url: str, in_csp: bool
) -> None:
    if in_csp:
        await csp.add("lab-1")
    allocator.add(claimed_before=True)
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: allocator.created)
    assert await csp.names() == ["lab-1"]
    assert allocator.created == {"lab-1": await csp.external_id("lab-1")}
    assert [call["account_name"] for call in await csp.calls("GET")][:1] == ["lab-1"]


@pytest.mark.parametrize("status", [504, 500, "hang", "cut", 200])
async def test_an_account_created_despite_an_error_is_found_by_the_next_attempt(
    csp: Csp, allocator: Allocator, amqp_url: str, status: int | str
) -> None:
    await csp.behave(fail_next_creates=1, create_error_status=status, create_error_after_effect=True)
    allocator.add()
    found_before = sample("broker_stock_accounts_found_total")
    async with provisioning(amqp_url, csp, create_timeout_sec=0.5):
        await wait_until(lambda: allocator.created)
    assert await csp.names() == ["lab-1"]
    assert len(await csp.calls("POST")) == 1
    assert sample("broker_stock_accounts_found_total") == found_before + 1


@pytest.mark.parametrize(
    ("status", "settles"), [(502, False), (504, False), ("cut", False), (503, True), (429, True)]
)
async def test_the_next_attempt_waits_until_an_unanswered_creation_has_ended(
    csp: Csp, allocator: Allocator, amqp_url: str, status: int | str, settles: bool
) -> None:
    await csp.behave(create_error_rate=1, create_error_status=status)
    allocator.add()
    async with provisioning(amqp_url, csp, create_timeout_sec=77):
        await wait_until(lambda: allocator.failed)
    delay = allocator.failed["lab-1"].retry_in_sec
    assert delay is not None
    assert (delay < 1) if settles else (delay >= 77)


async def test_a_failed_look_up_creates_no_account(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.add("lab-1")
    await csp.behave(find_error_rate=1, find_error_status=503)
    allocator.add(claimed_before=True)
    async with provisioning(amqp_url, csp, create_timeout_sec=77):
        await wait_until(lambda: len(allocator.all(RecordCreationFailure)) >= 2)
        await csp.behave(find_error_rate=0)
        await wait_until(lambda: allocator.created)
    assert len(await csp.calls("POST")) == 1, "only the account made by hand"


async def test_a_refusal_is_recorded_with_the_reason_of_csp(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(create_quota=0)
    allocator.add()
    before = sample("broker_stock_creation_failures_total", reason="refused")
    async with provisioning(amqp_url, csp, create_max_failures=7):
        await wait_until(lambda: allocator.failed)
        failure = allocator.failed["lab-1"]
        assert sample("broker_stock_circuit_state") == 0, "CSP works"
    assert failure.refused
    assert failure.error == "CSP refused the creation with 403: the quota of 0 sandboxes is used up"
    assert (failure.attempts, failure.max_failures) == (0, 7)
    assert failure.retry_in_sec is not None
    assert sample("broker_stock_creation_failures_total", reason="refused") == before + 1


async def test_an_invalid_name_ends_the_creation(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    allocator.add(name="x" * 300)
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: allocator.failed)
    (failure,) = allocator.failed.values()
    assert (failure.retry_in_sec, failure.refused) == (None, False)
    assert await csp.calls("POST") == []


async def test_a_refused_token_pauses_creations_and_counts_no_attempt(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await csp.behave(reject_tokens=True)
    allocator.add(5)
    async with provisioning(amqp_url, csp, create_concurrency=1):
        await wait_until(lambda: sample("broker_csp_unauthorized") == 1)
        await announce(amqp_url, size=20)
        await wait_until(lambda: sample("broker_stock_circuit_state") == 2)
        assert len(await csp.calls("POST")) == 1
        assert allocator.failed == {}
        assert len(allocator.all(ClaimCreations)) == 1


async def test_a_lost_record_is_repeated_after_the_claim_without_a_second_account(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    lost: list[RecordCreation] = []

    def lose_first(command: object) -> bool:
        if isinstance(command, RecordCreation) and not lost:
            lost.append(command)
            return True
        return False

    allocator.loses = lose_first
    allocator.add()
    async with provisioning(amqp_url, csp):
        await wait_until(lambda: lost)
        allocator.end_claims()
        await announce(amqp_url)
        await wait_until(lambda: allocator.created)
    assert await csp.names() == ["lab-1"]


async def test_a_frozen_process_drops_its_claim(csp: Csp) -> None:
    due = DueCreation(creation_id=1, name="lab-1", name_prefix="lab-", attempts=0, claimed_before=False)
    rpc_client = RpcClient("amqp://127.0.0.1:1/", "test", Publisher("amqp://127.0.0.1:1/", "test"))
    async with CspClient(f"{csp.url}/v2", DEFAULT_TOKEN) as client:
        circuit, allocator = CspCircuit(5, 60), MaintenanceClient(rpc_client, 0.1)
        creator = Creator(settings(), client, client, allocator, circuit)
        assert not await creator.create(uuid.uuid4(), due, begin_by=time.monotonic() - 1000)
        assert await csp.calls("POST") == []
        assert await creator.create(uuid.uuid4(), due, begin_by=time.monotonic())
    assert await csp.names() == ["lab-1"]


async def test_a_stop_ends_a_running_creation_at_once(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await csp.behave(create_latency_sec=600)
    allocator.add()
    async with asyncio.timeout(60), provisioning(amqp_url, csp):
        await wait_until(lambda: sample("broker_stock_creations_running") == 1)
    assert allocator.created == {}
