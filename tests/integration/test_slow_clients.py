"""A hundred clients that are in no hurry: everybody else is served, and they are gone in the end."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from devstack.ports import free_port
from devstack.wire import connected
from tests.integration.stack import TRACK_TOKEN, Stack, eventually, track

EACH = 25
HALF_A_BODY = f"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TRACK_TOKEN}\r\n".encode()
SENT = {
    "nothing": b"",
    "half a head": b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nX-Half",
    "half a body": HALF_A_BODY + b"Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
    "and reads nothing": 20 * b"GET /v1/docs/assets/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n",
}


async def metric(stack: Stack, url: str, name: str) -> float:
    lines = (await stack.client.get(f"{url}/metrics")).text.splitlines()
    return next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0.0)


@pytest.mark.parametrize("what", SENT)
async def test_who_is_slow_harms_nobody_and_is_cut_off(stack: Stack, what: str) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    gateway = await stack.start_service(
        "gateway", name="besieged gateway", settings={"GATEWAY_PORT": str(port), "CLIENT_TIMEOUT_SEC": "2"}
    )
    try:
        async with AsyncExitStack() as connections:
            slow = [await connections.enter_async_context(connected(url)) for _ in range(EACH)]
            for client in slow:
                await client.send(SENT[what])
            answers = await asyncio.gather(
                *(stack.client.post(f"{url}/v1/allocate", headers=track(f"student-{n}")) for n in range(20))
            )
            assert [answer.status_code for answer in answers] == [201] * 20

            async def all_are_cut_off() -> bool:
                return await metric(stack, url, "broker_slow_clients_total") == EACH

            await eventually(all_are_cut_off)
            if "reads nothing" not in what:
                assert await asyncio.gather(*(client.read_to_end() for client in slow)) == [b""] * EACH
    finally:
        await gateway.stop()
