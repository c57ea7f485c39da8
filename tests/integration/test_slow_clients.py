"""Slow clients: they do not delay other clients, and the gateway closes their connections."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.wire import connected
from tests.integration.stack import TRACK_TOKEN, Stack, track_headers

CONNECTIONS = 25
HEAD = f"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TRACK_TOKEN}\r\n".encode()
SENT_BYTES = {
    "no bytes": b"",
    "half a head": b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nX-Half",
    "half a body": HEAD + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    "requests without reading the responses": 20
    * b"GET /v1/docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n",
}


async def read_metric(stack: Stack, url: str, name: str) -> float:
    lines = (await stack.client.get(f"{url}/metrics")).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


@pytest.mark.parametrize("case", SENT_BYTES)
async def test_slow_clients_are_disconnected_and_others_are_served(stack: Stack, case: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    gateway = await stack.start_service(
        "gateway", name="gateway with slow clients", settings={"GATEWAY_PORT": str(port), "CLIENT_TIMEOUT_SEC": "2"}
    )
    try:
        async with AsyncExitStack() as connections:
            slow = [await connections.enter_async_context(connected(url)) for _ in range(CONNECTIONS)]
            for client in slow:
                await client.send(SENT_BYTES[case])
            responses = await asyncio.gather(
                *(stack.client.post(f"{url}/v1/allocate", headers=track_headers(f"student-{n}")) for n in range(20))
            )
            assert [response.status_code for response in responses] == [201] * 20

            async def are_all_disconnected() -> bool:
                return await read_metric(stack, url, "broker_slow_clients_total") == CONNECTIONS

            await wait_until(are_all_disconnected)
            if "without reading" not in case:
                assert await asyncio.gather(*(client.read_to_end() for client in slow)) == [b""] * CONNECTIONS
    finally:
        await gateway.stop()
