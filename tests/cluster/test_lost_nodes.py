"""The broker without one node of a RabbitMQ cluster, with a node that is cut off from the others, and after the
fail-over of a PostgreSQL pair.

Students work meanwhile, with the retry rules of the track script. `make chaos ARGS=--cluster` injects these and all
other faults of clusters.
"""

import asyncio
import random
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import asyncpg
import pytest

from devstack.conditions import wait_until
from devstack.postgres_pair import PostgresPair
from devstack.processes import run
from devstack.rabbitmq_cluster import NET_TICKTIME_SEC, RabbitMQCluster
from sandbox_broker.contract import topology
from sandbox_broker.messaging.connection import Disconnected
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.runtime.service import cancel_and_wait
from tests.chaos.client import History, Students
from tests.chaos.servers import Servers, start_cluster
from tests.integration.stack import ADMIN, PORTS, ROOT, Stack, run_stack, track_headers

pytest_plugins = ("devstack.fixtures",)
pytestmark = pytest.mark.timeout(600)  # the start of the servers counts as well

SANDBOXES = 1000
WORKING_STUDENTS = 5
READS = 50


@dataclass
class Broker:
    stack: Stack
    servers: Servers

    @property
    def rabbitmq(self) -> RabbitMQCluster:
        assert self.servers.cluster is not None
        return self.servers.cluster

    @property
    def postgres(self) -> PostgresPair:
        assert self.servers.pair is not None
        return self.servers.pair


@pytest.fixture(scope="module")
async def running_broker(rabbitmq_binaries: None, postgres_binaries: None) -> AsyncIterator[Broker]:
    async with AsyncExitStack() as resources:
        servers = await start_cluster(resources, net_ticktime_sec=NET_TICKTIME_SEC)
        settings = {"SYNC_INTERVAL_SEC": "2"}
        async with run_stack(servers.database_url, servers.amqp_url, settings=settings) as stack:
            yield Broker(stack, servers)


@pytest.fixture
async def broker(running_broker: Broker) -> AsyncIterator[Broker]:
    """Broker with available sandboxes, and students at work. Then checks that no student was refused."""
    await running_broker.stack.fill(SANDBOXES)
    history = History()
    async with run_students(running_broker.stack, history):
        yield running_broker
    assert [one for one in history.script_runs if not one.succeeded] == []
    assert len(history.script_runs) > WORKING_STUDENTS
    await running_broker.stack.assert_sound()


@asynccontextmanager
async def run_students(stack: Stack, history: History) -> AsyncIterator[None]:
    """Let students allocate and release sandboxes one after the other until the block ends."""
    stopping = asyncio.Event()

    async def run_student(number: int, students: Students) -> None:
        student, rng = f"student-{number}", random.Random(number)
        while not stopping.is_set():
            lease = await students.run_script("allocate", student, rng=rng)
            await students.run_script("release", student, lease.sandbox_id, rng=rng)
            await asyncio.sleep(1)  # pace of the load, not a wait for a condition

    async with Students([stack.url], history, random.Random(0)) as students, asyncio.TaskGroup() as tasks:
        for number in range(WORKING_STUDENTS):
            tasks.create_task(run_student(number, students))
        try:
            yield
        finally:
            stopping.set()


async def test_all_work_continues_while_the_leader_of_the_queues_is_down(broker: Broker) -> None:
    stack = broker.stack
    leader = await broker.rabbitmq.find_leader(topology.ALLOCATOR_COMMANDS.name)
    await leader.kill()
    async with queues_in_errors(broker):
        await allocate(stack, "ada")
        await assert_leases_expire(stack)
        await assert_periodic_syncs_run(stack)
        await assert_status_shows_every_queue(stack)
        for module in PORTS:
            await restart_service(stack, module)
        await allocate(stack, "cyd")
        await assert_topology_can_be_declared(stack)

    await leader.start()
    await broker.rabbitmq.wait_until_complete()
    await allocate(stack, "dan")


async def test_services_leave_a_node_that_is_cut_off_from_the_others(broker: Broker) -> None:
    """The services are the clients of that node only. RabbitMQ 4 keeps them there, RabbitMQ 3 closes their
    connections."""
    stack, links = broker.stack, broker.servers.client_links
    node = await broker.rabbitmq.find_leader(topology.ALLOCATOR_COMMANDS.name)
    others = [links[other] for other in broker.rabbitmq.nodes if other is not node]
    for link in others:
        link.reset()
    await wait_until(lambda: links[node].outgoing_ports and not any(link.outgoing_ports for link in others))
    await allocate(stack, "gus")
    for link in others:
        link.heal()
    cut = [link for ends, link in broker.servers.peer_links.items() if node in ends]
    for link in cut:
        link.black_hole()
    async with queues_in_errors(broker):
        await allocate(stack, "hal")
        await assert_leases_expire(stack)
        await assert_periodic_syncs_run(stack)

    for link in cut:
        link.heal()
    await broker.rabbitmq.wait_until_complete()
    await allocate(stack, "ida")


async def test_a_message_without_a_leader_stops_no_later_message(running_broker: Broker) -> None:
    """If the first message of a channel to a queue comes between the loss of the leader and the election, RabbitMQ
    3.10 refuses this and all later ones until the lost node is back."""
    cluster, queue = running_broker.rabbitmq, topology.EXPIRY_TICKS
    leader = await cluster.find_leader(queue.name)
    followers = [node for node in cluster.nodes if node is not leader]
    publisher = Publisher(",".join(node.url for node in followers), "test")

    async def publish(to: topology.Queue) -> None:
        await publisher.publish(topology.TICKS.name, to.name, b"{}")

    async def is_confirmed() -> bool:
        try:
            await publish(topology.STOCK_TICKS)  # the confirm of another queue is no reason to stay
            await publish(queue)
        except Disconnected:
            return False
        return True

    running = asyncio.create_task(publisher.run())
    try:
        await publisher.wait_connected()
        for node in followers:
            await node.run_rabbitmqctl("eval", f"sys:suspend(whereis('%2F_{queue.name}')).")
        await publish(topology.STOCK_TICKS)
        await leader.kill()
        with pytest.raises(Disconnected):
            await publish(queue)
        for node in followers:
            await node.run_rabbitmqctl("eval", f"sys:resume(whereis('%2F_{queue.name}')).")
        await wait_until(is_confirmed)
    finally:
        await cancel_and_wait(running)
        await leader.start()
        await cluster.wait_until_complete()


async def test_a_former_primary_is_never_read_after_the_fail_over(broker: Broker) -> None:
    stack, pair = broker.stack, broker.postgres
    pair.primary.freeze()
    await pair.promote()
    sandbox_id = await allocate(stack, "eve")

    async def is_read() -> bool:
        return (await read(stack, "eve", sandbox_id)) == 200

    await wait_until(is_read)
    pair.standby.thaw()
    assert await count_leases(pair.standby.url, "eve") == 0  # the former primary runs, without the lease

    assert [await read(stack, "eve", sandbox_id) for _ in range(READS)] == READS * [200]
    await restart_service(stack, "gateway")
    assert [await read(stack, "eve", sandbox_id) for _ in range(READS)] == READS * [200]
    await pair.rebuild_standby()
    await allocate(stack, "fay")


@asynccontextmanager
async def queues_in_errors(broker: Broker) -> AsyncIterator[None]:
    """Add the state of the queues and the last log lines of the services to an error of the block."""
    try:
        yield
    except Exception as error:
        error.add_note(await broker.rabbitmq.describe_queues())
        for process in broker.stack.processes.values():
            error.add_note("\n".join((f"log of {process.name}:", *process.tail)))
        raise


async def allocate(stack: Stack, student: str) -> str:
    """Send allocations until one succeeds. Return the id of the sandbox."""
    sandbox_id: str | None = None

    async def is_served() -> bool:
        nonlocal sandbox_id
        response = await stack.allocate(student)
        sandbox_id = response.json().get("sandbox_id")
        return response.status_code in (200, 201)

    await wait_until(is_served)
    assert sandbox_id is not None
    return sandbox_id


async def read(stack: Stack, student: str, sandbox_id: str) -> int:
    """Return the status of a read of the student's sandbox."""
    response = await stack.client.get(f"{stack.url}/v1/sandboxes/{sandbox_id}", headers=track_headers(student))
    return response.status_code


async def count_leases(database_url: str, student: str) -> int:
    connection = await asyncpg.connect(database_url)
    try:
        return int(await connection.fetchval("SELECT count(*) FROM leases WHERE holder = $1", student))
    finally:
        connection.terminate()


async def assert_leases_expire(stack: Stack) -> None:
    sandbox_id = await allocate(stack, "bob")
    await stack.database.execute("UPDATE leases SET expires_at = now() - interval '1 day' WHERE holder = 'bob'")

    async def has_expired() -> bool:
        query = "SELECT end_reason FROM leases WHERE sandbox_id = $1"
        return bool(await stack.database.fetchval(query, sandbox_id) == "expired")

    await wait_until(has_expired)


async def assert_periodic_syncs_run(stack: Stack) -> None:
    total = (await stack.stats())["total"]
    await stack.control("POST", "accounts", {"count": 1, "name_prefix": "late-"})

    async def is_imported() -> bool:
        return (await stack.stats())["total"] == total + 1

    await wait_until(is_imported)


async def assert_status_shows_every_queue(stack: Stack) -> None:
    async def is_complete() -> bool:
        response = await stack.client.get(f"{stack.url}/v1/admin/status", headers=ADMIN)
        status = response.json()
        return bool(
            status["rabbitmq"]["state"] == "up" and not [queue for queue in status["queues"] if queue["problem"]]
        )

    await wait_until(is_complete)


async def restart_service(stack: Stack, module: str) -> None:
    await stack.processes[module].stop()
    await stack.start_service(module)


async def assert_topology_can_be_declared(stack: Stack) -> None:
    """Run the job of a deployment that declares the queues."""
    code, output = await run(
        [sys.executable, "-m", "sandbox_broker.declare"], env=stack.environment, cwd=ROOT / "tests"
    )
    assert code == 0, output
