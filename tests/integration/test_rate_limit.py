"""Clients without a token cannot lock out a class behind the same address."""

import asyncio

from devstack.ports import free_port
from tests.integration.stack import ADMIN, Stack, track_headers

LIMIT = 40


async def test_a_class_is_served_while_its_address_is_refused_without_a_token(stack: Stack) -> None:
    await stack.fill(2 * LIMIT)
    port = free_port()
    gateway = await stack.start_service(
        "gateway",
        name="limited gateway",
        settings={"GATEWAY_PORT": str(port), "RATE_LIMIT": f"{LIMIT}/hour"},
    )
    url = f"http://127.0.0.1:{port}"
    try:
        # All from one address, more than the limit of any counter.
        unknown = await asyncio.gather(
            *(stack.client.post(f"{url}/v1/allocate") for _ in range(LIMIT)),
            *(stack.client.get(f"{url}/v1/docs") for _ in range(LIMIT)),
            *(stack.client.get(f"{url}/nope") for _ in range(LIMIT)),
        )
        assert sum(response.status_code == 429 for response in unknown) >= 2 * LIMIT
        assert (await stack.client.get(f"{url}/v1/docs")).status_code == 429

        leased = await asyncio.gather(
            *(
                stack.client.post(f"{url}/v1/allocate", headers=track_headers(f"student-{n}"))
                for n in range(2 * LIMIT)
            )
        )
        assert [response.status_code for response in leased] == [201] * (2 * LIMIT)
        assert {response.headers["X-RateLimit-Remaining"] for response in leased} == {str(LIMIT - 1)}
        assert (await stack.client.get(f"{url}/v1/admin/stats", headers=ADMIN)).status_code == 200

        repeated = [
            await stack.client.post(f"{url}/v1/allocate", headers=track_headers("student-0")) for _ in range(LIMIT)
        ]
        assert [response.status_code for response in repeated] == [200] * (LIMIT - 1) + [429]
        assert (
            await stack.client.post(f"{url}/v1/allocate", headers=track_headers("student-1"))
        ).status_code == 200
    finally:
        await gateway.stop()
