"""Tests of allocator_client.py through HTTP: replies, refusals, coalescing and disconnected clients."""

import asyncio
from collections.abc import AsyncIterator
from typing import get_args
from urllib.parse import urlsplit

import pytest
from structlog.testing import capture_logs

from csp_simulator.testing import serving
from devstack.conditions import wait_until
from gateway import allocator_client
from gateway.api.error_table import ERRORS
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import AllocateSandbox, Command, ReleaseSandbox, SyncPool
from sandbox_broker.contract.replies import LeaseGranted, RefusalCode, Reply
from sandbox_broker.messaging.outcome import NoReply
from sandbox_broker.messaging.rpc_client import RpcClient

from .gateway_harness import (
    ADMIN,
    LEASE,
    STUDENT,
    TRACK,
    Gateway,
    detail,
    refuse,
    running,
    sample,
    say_nothing,
)

SPEC_FIELDS = {"sandbox_id", "name", "external_id", "allocated_at", "expires_at", "sfdc_account_id"}


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url, allocate_timeout_sec=5, admin_wait_sec=5) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


async def reply_with_own_lease(command: Command) -> Reply:
    """Return a lease with a sandbox id that names the holder."""
    assert isinstance(command, AllocateSandbox)
    return LEASE.model_copy(update={"sandbox_id": f"of-{command.holder}"})


async def allocate_for(gateway: Gateway, holder: str) -> tuple[int, str]:
    response = await gateway.allocate(**{"X-Instruqt-Sandbox-ID": holder})
    return response.status_code, response.json().get("sandbox_id") or response.json()["detail"]["code"]


async def test_new_lease_returns_201_with_the_specified_fields(gateway: Gateway) -> None:
    before = sample("broker_allocate_total", outcome="allocated")
    response = await gateway.allocate()
    assert response.status_code == 201
    assert response.headers["Content-Type"] == "application/json"
    assert response.json() == LEASE.model_dump(include=SPEC_FIELDS)
    assert response.json().keys() == SPEC_FIELDS
    assert sample("broker_allocate_total", outcome="allocated") == before + 1


async def test_active_lease_returns_200(gateway: Gateway) -> None:
    async def answer(_: Command) -> Reply:
        return LEASE.model_copy(update={"new": False, "sfdc_account_id": "001"})

    gateway.allocator.answer = answer
    hits = sample("broker_allocate_idempotent_hits_total")
    waits = sample("broker_allocation_latency_seconds_count")
    response = await gateway.allocate()
    assert response.status_code == 200
    assert response.json() == LEASE.model_dump(include=SPEC_FIELDS) | {"sfdc_account_id": "001"}
    assert sample("broker_allocate_idempotent_hits_total") == hits + 1
    assert sample("broker_allocation_latency_seconds_count") == waits + 1


async def test_release_returns_200_with_the_specified_fields(gateway: Gateway) -> None:
    before = sample("broker_deletion_marked_total", outcome="marked")
    response = await gateway.client.post("/v1/sandboxes/77/mark-for-deletion", headers=STUDENT)
    assert response.status_code == 200
    assert response.json() == {
        "sandbox_id": "77",
        "status": "pending_deletion",
        "deletion_requested_at": 1728054200,
    }
    (command,) = gateway.allocator.commands
    assert isinstance(command, ReleaseSandbox)
    assert (command.sandbox_id, command.holder) == ("77", "student-1")
    assert command.request_id == response.headers["X-Request-ID"]
    assert sample("broker_deletion_marked_total", outcome="marked") == before + 1


def test_every_refusal_code_except_invalid_command_has_a_status() -> None:
    assert set(get_args(RefusalCode)) - ERRORS.keys() == {"INVALID_COMMAND"}


@pytest.mark.parametrize(
    ("code", "status", "retry_after"),
    [
        ("POOL_EXHAUSTED", 409, 30),
        ("IDEMPOTENCY_KEY_CONFLICT", 409, None),
        ("NOT_SANDBOX_OWNER", 403, None),
        ("SANDBOX_NOT_FOUND", 404, None),
        ("ALLOCATOR_UNAVAILABLE", 503, 2),
        ("INTERNAL_ERROR", 500, 5),
    ],
)
async def test_refusal_returns_the_status_of_its_code(
    gateway: Gateway, code: str, status: int, retry_after: int | None
) -> None:
    gateway.allocator.answer = refuse(code, "No available sandboxes in pool")
    allocations = sample("broker_allocate_total", outcome=code.lower())
    releases = sample("broker_deletion_marked_total", outcome=code.lower())
    for path in ("/v1/allocate", "/v1/sandboxes/1/mark-for-deletion"):
        response = await gateway.client.post(path, headers=STUDENT)
        assert response.status_code == status
        assert detail(response)["code"] == code
        assert detail(response)["message"] == "No available sandboxes in pool"
        assert detail(response).get("retry_after") == retry_after
    assert sample("broker_allocate_total", outcome=code.lower()) == allocations + 1
    assert sample("broker_deletion_marked_total", outcome=code.lower()) == releases + 1


async def test_refusal_with_parameters_is_worded_by_the_table(gateway: Gateway) -> None:
    async def answer(_: Command) -> Reply:
        return replies.refuse("POOL_EXHAUSTED", cause="name_prefix", name_prefix="lab-")

    gateway.allocator.answer = answer
    assert detail(await gateway.allocate())["message"] == (
        "No available sandboxes in pool with the name prefix 'lab-'. Try again later, or ask the operator for more."
    )


@pytest.mark.parametrize("code", ["INVALID_COMMAND", "wrong reply"])
async def test_unexpected_reply_returns_500(gateway: Gateway, code: str) -> None:
    async def reply_wrongly(_: Command) -> Reply:
        return await refuse("INVALID_COMMAND")(_) if code == "INVALID_COMMAND" else LEASE

    gateway.allocator.answer = reply_wrongly
    with capture_logs():
        response = await gateway.client.post("/v1/sandboxes/1/mark-for-deletion", headers=STUDENT)
    assert (response.status_code, detail(response)["code"]) == (500, "INTERNAL_ERROR")
    assert "LeaseGranted" not in response.text


async def test_too_many_requests_in_flight_return_503_until_replies_arrive(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allocator_client, "MAX_IN_FLIGHT", 10)
    gate = asyncio.Event()

    async def reply_when_gate_opens(command: Command) -> Reply:
        await gate.wait()
        return LEASE

    gateway.allocator.answer = reply_when_gate_opens
    waiting = [asyncio.create_task(gateway.allocate()) for _ in range(10)]
    await wait_until(lambda: gateway.app.state.context.allocator.in_flight == 10)
    response = await gateway.allocate()
    assert (response.status_code, detail(response)["code"]) == (503, "ALLOCATOR_UNAVAILABLE")
    assert detail(response)["retry_after"]
    gate.set()
    assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [201] * 10
    assert (await gateway.allocate()).status_code == 201


async def test_requests_during_a_publish_share_the_next_envelope(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway.allocator.answer = reply_with_own_lease
    first_is_publishing, may_continue = asyncio.Event(), asyncio.Event()
    real_send = RpcClient.send

    async def slow_first_send(self: RpcClient, *args: object, **named: object) -> object:
        if not first_is_publishing.is_set():
            first_is_publishing.set()
            await may_continue.wait()
        return await real_send(self, *args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(RpcClient, "send", slow_first_send)
    first = asyncio.create_task(allocate_for(gateway, "first"))
    await first_is_publishing.wait()
    later = [asyncio.create_task(allocate_for(gateway, f"s{number}")) for number in range(50)]
    await wait_until(lambda: len(gateway.app.state.context.allocator._queued) == 50)
    may_continue.set()
    assert await first == (201, "of-first")
    assert await asyncio.gather(*later) == [(201, f"of-s{number}") for number in range(50)]
    assert sorted(map(len, gateway.allocator.envelopes)) == [1, 50]


async def test_burst_uses_few_envelopes_and_each_caller_gets_its_own_reply(gateway: Gateway) -> None:
    gateway.allocator.answer = reply_with_own_lease
    answers = await asyncio.gather(*(allocate_for(gateway, f"s{number}") for number in range(250)))
    assert answers == [(201, f"of-s{number}") for number in range(250)]
    assert len(gateway.allocator.commands) == 250
    assert max(map(len, gateway.allocator.envelopes)) <= 200
    assert len(gateway.allocator.envelopes) < 100


async def test_timeout_of_one_request_does_not_affect_others_in_its_envelope(gateway: Gateway) -> None:
    """The reply of the shared envelope arrives after the deadline of one request and before that of the other."""
    gate = asyncio.Event()

    async def reply_when_gate_opens(command: Command) -> Reply:
        await gate.wait()
        return await reply_with_own_lease(command)

    gateway.allocator.answer = reply_when_gate_opens
    allocator = gateway.app.state.context.allocator

    def command(holder: str) -> AllocateSandbox:
        return AllocateSandbox(request_id="r", holder=holder)

    hasty = asyncio.create_task(allocator.request(command("hasty"), timeout_sec=0.3))
    patient = asyncio.create_task(allocator.request(command("patient"), timeout_sec=20))
    with pytest.raises(NoReply):
        await hasty
    await wait_until(lambda: len(gateway.allocator.commands) == 2)
    assert len(gateway.allocator.envelopes) == 1
    gate.set()
    reply = await patient
    assert isinstance(reply, LeaseGranted)
    assert reply.sandbox_id == "of-patient"
    assert allocator.in_flight == 0


async def test_disconnected_clients_leave_no_pending_requests(gateway: Gateway) -> None:
    gate = asyncio.Event()

    async def reply_when_gate_opens(command: Command) -> Reply:
        await gate.wait()
        return await reply_with_own_lease(command)

    gateway.allocator.answer = reply_when_gate_opens
    context = gateway.app.state.context
    before = set(context.rpc_client._waiting)
    async with serving(gateway.app) as url:
        writers = []
        for number in range(5):
            _, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
            head = {**TRACK, "Host": "gateway", "X-Instruqt-Sandbox-ID": f"gone-{number}"}
            lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
            writer.write(f"POST /v1/allocate HTTP/1.1\r\n{lines}\r\n".encode())
            writers.append(writer)
        staying = asyncio.create_task(allocate_for(gateway, "staying"))
        await wait_until(lambda: len(gateway.allocator.commands) == 6)
        for writer in writers:
            writer.transport.abort()
        gate.set()
        assert await staying == (201, "of-staying")
        await wait_until(lambda: context.allocator.in_flight == 0)
    assert not context.allocator._queued
    await wait_until(lambda: not set(context.rpc_client._waiting) - before)


async def test_cancelled_request_leaves_no_pending_request(gateway: Gateway) -> None:
    gateway.allocator.answer = say_nothing
    context = gateway.app.state.context
    request = asyncio.create_task(gateway.allocate())
    await wait_until(lambda: gateway.allocator.commands)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert context.allocator.in_flight == 0
    gateway.reset()
    assert (await gateway.allocate()).status_code == 201


async def test_sync_returns_the_specified_fields(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/admin/sync", headers=ADMIN)
    assert response.status_code == 200
    assert response.json() == {
        "status": "completed",
        "synced": 5,
        "marked_stale": 1,
        "restored": 2,
        "duration_ms": 34,
    }
    await gateway.client.post("/v1/admin/sync?force=true", headers=ADMIN)
    assert [command.force for command in gateway.syncer.commands if isinstance(command, SyncPool)] == [False, True]


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("SYNC_HELD", 409),
        ("LISTING_OUTDATED", 409),
        ("CSP_UNAVAILABLE", 502),
        ("ALLOCATOR_UNAVAILABLE", 503),
        ("INVALID_COMMAND", 500),
    ],
)
async def test_refused_sync_returns_the_status_of_its_code(gateway: Gateway, code: str, status: int) -> None:
    gateway.syncer.answer = refuse(code)
    with capture_logs():
        response = await gateway.client.post("/v1/admin/sync", headers=ADMIN)
    assert response.status_code == status
    assert detail(response)["code"] == (code if status != 500 else "INTERNAL_ERROR")
