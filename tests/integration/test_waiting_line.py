"""Waiting line over the public interfaces: students wait, services restart, sandboxes appear."""

import asyncio
import signal
from collections.abc import AsyncIterator, Sequence

import httpx
import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import PORTS, Stack, run_stack

WAIT = "respond-async, wait=900"


@pytest.fixture(scope="module")
async def stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with new_database() as database_url, new_vhost() as amqp_url, run_stack(database_url, amqp_url) as stack:
        yield stack


async def ask(stack: Stack, student: str, **headers: str) -> httpx.Response:
    return await stack.allocate(student, Prefer=WAIT, **headers)


async def join(stack: Stack, students: Sequence[str]) -> None:
    """Let the students join the line one after the other."""
    for position, student in enumerate(students, start=1):
        response = await ask(stack, student)
        assert response.status_code == 202, response.text
        assert response.json()["position"] == position
        assert response.headers["Retry-After"] == str(response.json()["retry_after"])
        assert response.headers["Preference-Applied"] == "respond-async"


async def create(stack: Stack, count: int) -> None:
    """Create accounts in CSP, and import them as soon as the services answer."""
    await stack.control("POST", "accounts", {"count": count, "name_prefix": "sandbox-"})

    async def is_imported() -> bool:
        return (await stack.sync(force="true")).status_code == 200

    await wait_until(is_imported)


async def list_holders(stack: Stack) -> set[str]:
    rows = await stack.database.fetch("SELECT holder FROM leases WHERE ended_at IS NULL")
    return {row["holder"] for row in rows}


async def wait_until_served(stack: Stack, students: Sequence[str]) -> None:
    async def are_served() -> bool:
        return await list_holders(stack) >= set(students)

    await wait_until(are_served)
    assert await list_holders(stack) == set(students)


async def test_new_sandboxes_are_leased_in_the_order_of_arrival(stack: Stack) -> None:
    await stack.fill(0)
    students = [f"student-{number}" for number in (5, 3, 8, 1, 9, 2)]
    await join(stack, students)
    assert (await stack.allocate("impatient")).status_code == 409
    await create(stack, 4)
    await wait_until_served(stack, students[:4])
    lease = await ask(stack, students[0])
    assert lease.status_code == 200
    assert {response.status_code for response in [await ask(stack, student) for student in students[4:]]} == {202}
    first = (await stack.admin("GET", "waiting", limit="1")).json()
    rest = (await stack.admin("GET", "waiting", limit="1", cursor=first["cursor"])).json()
    assert [page["waiting"][0]["holder"] for page in (first, rest)] == students[4:]
    assert (first["count"], rest["cursor"]) == (1, None)
    await stack.assert_sound()


async def test_a_refusal_without_prefer_does_not_depend_on_the_line(stack: Stack) -> None:
    """Clients of earlier versions get the same bytes from both ways through the allocator."""

    async def refuse(**headers: str) -> tuple[int, bytes, list[tuple[str, str]]]:
        response = await stack.allocate("impatient", **headers, **{"X-Request-ID": "request"})
        return (
            response.status_code,
            response.content,
            [(name, value) for name, value in response.headers.items() if name != "date"],
        )

    await stack.fill(0)
    before = await refuse()
    assert before[0] == 409
    await join(stack, ["student-1"])
    assert await refuse() == before
    assert await refuse(Prefer="return=minimal") == before


async def test_the_line_survives_the_death_of_all_services(stack: Stack) -> None:
    await stack.fill(0)
    students = [f"student-{number}" for number in range(6)]
    await join(stack, students)
    services = [stack.processes[module] for module in PORTS]
    for process in services:
        process.send(signal.SIGKILL)
    await asyncio.gather(*(process.wait() for process in services))
    await asyncio.gather(*(stack.start_service(module) for module in PORTS))
    await create(stack, 4)
    await wait_until_served(stack, students[:4])
    assert (await ask(stack, students[5])).json()["position"] == 2


async def test_a_standby_allocator_continues_the_line(stack: Stack) -> None:
    await stack.fill(0)
    students = [f"student-{number}" for number in range(4)]
    await join(stack, students)
    await stack.start_service("allocator", name="standby")
    stack.processes["allocator"].send(signal.SIGKILL)
    await create(stack, 2)
    await wait_until_served(stack, students[:2])
