"""A gateway that is told to stop loses no request, and ends whatever its clients do."""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx

from devstack.ports import free_port
from devstack.processes import Process
from devstack.wire import GET_HEALTH, connected
from tests.integration.stack import Stack, eventually, track

GET_BUNDLE = b"GET /v1/docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"


def allocate(student: str, more: str = "") -> bytes:
    headers = "".join(f"{name}: {value}\r\n" for name, value in track(student).items())
    return f"POST /v1/allocate HTTP/1.1\r\nHost: x\r\n{headers}{more}\r\n".encode()


@asynccontextmanager
async def leaving(stack: Stack, settings: Mapping[str, str]) -> AsyncIterator[tuple[Process, str]]:
    """One more gateway."""
    port = free_port()
    process = await stack.start_service(
        "gateway", name="leaving gateway", settings={"GATEWAY_PORT": str(port), **settings}
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        await process.stop(with_signal=signal.SIGINT)


async def listens_no_more(url: str) -> bool:
    try:
        async with connected(url):
            return False
    except ConnectionRefusedError:
        return True


async def test_it_is_not_ready_first_and_goes_on_serving(stack: Stack) -> None:
    # The drain is longer than it all takes; Ctrl-C ends it.
    async with leaving(stack, {"DRAIN_SEC": "20"}) as (process, url):
        before = await stack.client.post(f"{url}/v1/allocate", headers=track("ada"))
        assert before.status_code == 201
        assert "Connection" not in before.headers
        process.send(signal.SIGTERM)

        async def not_ready() -> bool:
            return (await stack.client.get(f"{url}/readyz")).status_code == 503

        await eventually(not_ready)
        detail = (await stack.client.get(f"{url}/readyz")).json()["detail"]
        assert (detail["code"], "stopping" in detail["message"]) == ("NOT_READY", True)
        during = await stack.client.post(f"{url}/v1/allocate", headers=track("ben"))
        assert (during.status_code, during.headers["Connection"]) == (201, "close")
        assert (await stack.client.get(f"{url}/healthz")).status_code == 200
        process.send(signal.SIGINT)
        assert await process.wait() == 0


async def test_the_ports_of_the_api_and_of_the_platform_drain_together(stack: Stack) -> None:
    ops_port = free_port()
    settings = {"DRAIN_SEC": "20", "OPS_PORT": str(ops_port)}
    gateway, url = await stack.launch("gateway", name="leaving gateway", settings=settings)
    ops = f"http://127.0.0.1:{ops_port}"
    try:
        await stack.until_ready(f"{ops}/readyz", gateway)
        assert (await stack.client.get(f"{url}/readyz")).status_code == 404
        assert (await stack.client.post(f"{ops}/v1/allocate", headers=track("ada"))).status_code == 404
        assert "broker_request_latency_seconds" in (await stack.client.get(f"{ops}/metrics")).text
        gateway.send(signal.SIGTERM)

        async def not_ready() -> bool:
            return (await stack.client.get(f"{ops}/readyz")).status_code == 503

        await eventually(not_ready)
        during = await stack.client.post(f"{url}/v1/allocate", headers=track("ada"))
        assert (during.status_code, during.headers["Connection"]) == (201, "close")
        alive = await stack.client.get(f"{ops}/healthz")
        assert (alive.status_code, alive.headers["Connection"]) == (200, "close")
    finally:
        await gateway.stop(with_signal=signal.SIGINT)
    assert await gateway.wait() == 0
    assert await listens_no_more(url)
    assert await listens_no_more(ops)


async def test_a_request_in_flight_is_answered_and_who_is_idle_is_sent_away(stack: Stack) -> None:
    allocator = stack.processes["allocator"]
    async with (
        leaving(stack, {"ALLOCATE_TIMEOUT_SEC": "60"}) as (process, url),
        connected(url) as student,
        connected(url) as idle,
    ):
        await student.send(GET_HEALTH)
        assert (await student.response())[0] == 200
        allocator.send(signal.SIGSTOP)
        try:
            await student.send(allocate("ada"))
            # Whose request was there before is read before.
            await idle.send(GET_HEALTH)
            assert (await idle.response())[0] == 200
            process.send(signal.SIGTERM)
            assert await idle.cut_off() == b""

            async def closed() -> bool:
                return await listens_no_more(url)

            await eventually(closed)
            assert process.running
        finally:
            allocator.send(signal.SIGCONT)
        status, lease = await student.response()
        assert (status, b"connection: close" in student.head) == (201, True)
        assert await process.wait() == 0
    held = await stack.database.fetchval("SELECT sandbox_id FROM leases WHERE holder = 'ada' AND ended_at IS NULL")
    assert lease["sandbox_id"] == held


async def test_no_client_can_keep_it_from_ending(stack: Stack) -> None:
    """Each of them would be waited for much longer than a stop may take."""
    async with (
        leaving(stack, {"CLIENT_TIMEOUT_SEC": "300"}) as (process, url),
        connected(url) as silent,
        connected(url) as half_a_head,
        connected(url) as half_a_body,
        connected(url) as deaf,
    ):
        await half_a_head.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        await half_a_body.send(allocate("ada", "Transfer-Encoding: chunked\r\n") + b"4\r\nhalf\r\n")
        await deaf.send(20 * GET_BUNDLE)  # more than fits between us: 1.4 MB for each
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{url}/healthz")).status_code == 200
        process.send(signal.SIGTERM)
        assert await silent.cut_off() == await half_a_head.cut_off() == b""
        assert await asyncio.wait_for(process.wait(), 60) == 0
        status, body = await half_a_body.response()
        assert (status, body["detail"]["code"]) == (503, "STOPPING")
    assert (await stack.stats())["allocated"] == 0
