"""Graceful stop of the gateway: it completes open requests, and no client can delay its end."""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import httpx

from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.processes import Process
from devstack.wire import GET_HEALTH, connected
from tests.integration.stack import Stack, track_headers

GET_BUNDLE = b"GET /v1/docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"


def build_allocate_request(student: str, extra_headers: str = "") -> bytes:
    headers = "".join(f"{name}: {value}\r\n" for name, value in track_headers(student).items())
    return f"POST /v1/allocate HTTP/1.1\r\nHost: x\r\n{headers}{extra_headers}\r\n".encode()


@asynccontextmanager
async def start_gateway(stack: Stack, settings: Mapping[str, str]) -> AsyncIterator[tuple[Process, str]]:
    """Start another gateway. Returns its process and URL."""
    port = free_port()
    process = await stack.start_service(
        "gateway", name="stopping gateway", settings={"GATEWAY_PORT": str(port), **settings}
    )
    try:
        yield process, f"http://127.0.0.1:{port}"
    finally:
        await process.stop(with_signal=signal.SIGINT)


async def refuses_connections(url: str) -> bool:
    try:
        async with connected(url):
            return False
    except ConnectionRefusedError:
        return True


async def test_a_draining_gateway_is_not_ready_but_still_serves(stack: Stack) -> None:
    # DRAIN_SEC exceeds the duration of the test. SIGINT ends the drain.
    async with start_gateway(stack, {"DRAIN_SEC": "20"}) as (process, url):
        before = await stack.client.post(f"{url}/v1/allocate", headers=track_headers("ada"))
        assert before.status_code == 201
        assert "Connection" not in before.headers
        process.send(signal.SIGTERM)

        async def is_not_ready() -> bool:
            return (await stack.client.get(f"{url}/readyz")).status_code == 503

        await wait_until(is_not_ready)
        detail = (await stack.client.get(f"{url}/readyz")).json()["detail"]
        assert (detail["code"], "stopping" in detail["message"]) == ("NOT_READY", True)
        during = await stack.client.post(f"{url}/v1/allocate", headers=track_headers("ben"))
        assert (during.status_code, during.headers["Connection"]) == (201, "close")
        assert (await stack.client.get(f"{url}/healthz")).status_code == 200
        process.send(signal.SIGINT)
        assert await process.wait() == 0


async def test_the_api_port_and_the_ops_port_drain_together(stack: Stack) -> None:
    ops_port = free_port()
    settings = {"DRAIN_SEC": "20", "OPS_PORT": str(ops_port)}
    gateway, url = await stack.launch("gateway", name="stopping gateway", settings=settings)
    ops = f"http://127.0.0.1:{ops_port}"
    try:
        await stack.until_ready(f"{ops}/readyz", gateway)
        assert (await stack.client.get(f"{url}/readyz")).status_code == 404
        assert (await stack.client.post(f"{ops}/v1/allocate", headers=track_headers("ada"))).status_code == 404
        assert "broker_request_latency_seconds" in (await stack.client.get(f"{ops}/metrics")).text
        gateway.send(signal.SIGTERM)

        async def is_not_ready() -> bool:
            return (await stack.client.get(f"{ops}/readyz")).status_code == 503

        await wait_until(is_not_ready)
        during = await stack.client.post(f"{url}/v1/allocate", headers=track_headers("ada"))
        assert (during.status_code, during.headers["Connection"]) == (201, "close")
        response = await stack.client.get(f"{ops}/healthz")
        assert (response.status_code, response.headers["Connection"]) == (200, "close")
    finally:
        await gateway.stop(with_signal=signal.SIGINT)
    assert await gateway.wait() == 0
    assert await refuses_connections(url)
    assert await refuses_connections(ops)


async def test_an_open_request_is_completed_and_an_idle_connection_is_closed(stack: Stack) -> None:
    allocator = stack.processes["allocator"]
    async with (
        start_gateway(stack, {"ALLOCATE_TIMEOUT_SEC": "60"}) as (process, url),
        connected(url) as student,
        connected(url) as idle,
    ):
        await student.send(GET_HEALTH)
        assert (await student.response())[0] == 200
        allocator.send(signal.SIGSTOP)
        try:
            await student.send(build_allocate_request("ada"))
            # The response to `idle` proves that the gateway has read the earlier request of `student`.
            await idle.send(GET_HEALTH)
            assert (await idle.response())[0] == 200
            process.send(signal.SIGTERM)
            assert await idle.read_to_end() == b""

            async def is_closed() -> bool:
                return await refuses_connections(url)

            await wait_until(is_closed)
            assert process.running
        finally:
            allocator.send(signal.SIGCONT)
        status, lease = await student.response()
        assert (status, b"connection: close" in student.head) == (201, True)
        assert await process.wait() == 0
    held = await stack.database.fetchval("SELECT sandbox_id FROM leases WHERE holder = 'ada' AND ended_at IS NULL")
    assert lease["sandbox_id"] == held


async def test_no_client_can_delay_the_stop(stack: Stack) -> None:
    """CLIENT_TIMEOUT_SEC exceeds the time allowed for a stop, so each of these clients could delay it."""
    async with (
        start_gateway(stack, {"CLIENT_TIMEOUT_SEC": "300"}) as (process, url),
        connected(url) as silent,
        connected(url) as partial_head,
        connected(url) as partial_body,
        connected(url) as non_reading,
    ):
        await partial_head.send(b"GET /healthz HTTP/1.1\r\nHost: x\r\n")
        await partial_body.send(build_allocate_request("ada", "Transfer-Encoding: chunked\r\n") + b"4\r\nhalf\r\n")
        await non_reading.send(20 * GET_BUNDLE)  # 1.4 MB each, more than the socket buffers hold
        async with httpx.AsyncClient(trust_env=False) as client:
            assert (await client.get(f"{url}/healthz")).status_code == 200
        process.send(signal.SIGTERM)
        assert await silent.read_to_end() == await partial_head.read_to_end() == b""
        assert await asyncio.wait_for(process.wait(), 60) == 0
        status, body = await partial_body.response()
        assert (status, body["detail"]["code"]) == (503, "STOPPING")
    assert (await stack.stats())["allocated"] == 0
