"""Nodes of the RabbitMQ cluster and of the PostgreSQL pair that are killed, frozen or cut off.

The wait of a new student counts from the fault, because the other nodes can take over. After the loss of two nodes,
or of the primary, it counts from the return of a node or the promotion of the standby.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence

from devstack.postgres_pair import PostgresPair
from devstack.rabbitmq import PrivateRabbitMQ
from devstack.rabbitmq_cluster import RabbitMQCluster
from sandbox_broker.contract import topology
from tests.chaos.faults import Fault
from tests.chaos.proxy import Proxy
from tests.chaos.stack import ChaosBroker

KILLED_WITHIN_SEC = 10.0
SILENT_WITHIN_SEC = 15.0
"""For a node that is frozen or cut off, which the others must first notice."""
PROMOTED_WITHIN_SEC = 5.0
RETURNED_WITHIN_SEC = 10.0
DOWN_SEC = 10.0
SILENT_SEC = 25.0
"""Longer than RabbitMQ takes to notice a silent node."""
PROMOTION_DELAY_SEC = 5.0
"""Time that a fail-over manager takes to detect the loss of the primary."""
FORMER_PRIMARY_SEC = 10.0
"""Time for which a former primary runs beside the new one."""

SelectNodes = Callable[[RabbitMQCluster], Awaitable[Sequence[PrivateRabbitMQ]]]


def list_faults(rng: random.Random) -> list[Fault]:
    async def select_leader(cluster: RabbitMQCluster) -> Sequence[PrivateRabbitMQ]:
        return [await cluster.find_leader(topology.ALLOCATOR_COMMANDS.name)]

    async def select_follower(cluster: RabbitMQCluster) -> Sequence[PrivateRabbitMQ]:
        leader = await cluster.find_leader(topology.ALLOCATOR_COMMANDS.name)
        return [rng.choice([node for node in cluster.nodes if node is not leader])]

    async def select_two(cluster: RabbitMQCluster) -> Sequence[PrivateRabbitMQ]:
        return rng.sample(cluster.nodes, 2)

    return [
        build_kill_of_node("RabbitMQ follower killed", select_follower),
        build_kill_of_node("RabbitMQ leader killed", select_leader),
        build_kill_of_two("two RabbitMQ nodes killed, one returns", select_two),
        build_freeze_of_node("RabbitMQ leader frozen", select_leader),
        build_cut_of_node("RabbitMQ leader cut off from the nodes", select_leader, with_clients=False),
        build_cut_of_node("RabbitMQ leader cut off from nodes and clients", select_leader, with_clients=True),
        build_loss_of_primary("PostgreSQL primary killed, standby promoted", _kill_primary),
        build_loss_of_primary("PostgreSQL primary frozen, standby promoted", _freeze_primary),
        build_loss_of_standby("PostgreSQL standby killed"),
    ]


def build_kill_of_node(name: str, select: SelectNodes) -> Fault:
    killed: list[PrivateRabbitMQ] = []

    async def inject(broker: ChaosBroker) -> None:
        killed.extend(await select(_get_cluster(broker)))
        for node in killed:
            await node.kill()

    async def heal(broker: ChaosBroker) -> None:
        await _start_nodes(broker, killed)

    return _build_fault(name, "RabbitMQ", inject, heal, DOWN_SEC, KILLED_WITHIN_SEC)


def build_kill_of_two(name: str, select: SelectNodes) -> Fault:
    """Kill two nodes. The fault is injected when the first of them has returned."""
    away: list[PrivateRabbitMQ] = []

    async def inject(broker: ChaosBroker) -> None:
        away.extend(await select(_get_cluster(broker)))
        await asyncio.gather(*(node.kill() for node in away))
        await asyncio.sleep(DOWN_SEC)
        await away.pop().start()

    async def heal(broker: ChaosBroker) -> None:
        await _start_nodes(broker, away)

    return _build_fault(name, "RabbitMQ", inject, heal, DOWN_SEC, RETURNED_WITHIN_SEC)


def build_freeze_of_node(name: str, select: SelectNodes) -> Fault:
    frozen: list[PrivateRabbitMQ] = []

    async def inject(broker: ChaosBroker) -> None:
        frozen.extend(await select(_get_cluster(broker)))
        for node in frozen:
            node.freeze()

    async def heal(broker: ChaosBroker) -> None:
        for node in frozen:
            node.thaw()
        frozen.clear()
        await _get_cluster(broker).wait_until_complete()

    return _build_fault(name, "RabbitMQ", inject, heal, SILENT_SEC, SILENT_WITHIN_SEC)


def build_cut_of_node(name: str, select: SelectNodes, *, with_clients: bool) -> Fault:
    """Hold back all data between a node and the others, and between the node and its clients."""
    cut: list[Proxy] = []

    async def inject(broker: ChaosBroker) -> None:
        for node in await select(_get_cluster(broker)):
            cut.extend(link for ends, link in broker.servers.peer_links.items() if node in ends)
            if with_clients:
                cut.append(broker.servers.client_links[node])
        for link in cut:
            link.black_hole()

    async def heal(broker: ChaosBroker) -> None:
        for link in cut:
            link.heal()
        cut.clear()
        await _get_cluster(broker).wait_until_complete()

    return _build_fault(name, "RabbitMQ", inject, heal, SILENT_SEC, SILENT_WITHIN_SEC)


def build_loss_of_primary(name: str, lose: Callable[[PostgresPair], Awaitable[None]]) -> Fault:
    """Lose the primary, promote the standby, let the former primary run beside the new one, and rebuild it."""

    async def inject(broker: ChaosBroker) -> None:
        pair = _get_pair(broker)
        await lose(pair)
        await asyncio.sleep(PROMOTION_DELAY_SEC)
        await pair.promote()

    async def heal(broker: ChaosBroker) -> None:
        pair = _get_pair(broker)
        pair.standby.thaw()
        await asyncio.sleep(FORMER_PRIMARY_SEC)
        await pair.rebuild_standby()

    return _build_fault(name, "PostgreSQL", inject, heal, DOWN_SEC, PROMOTED_WITHIN_SEC)


def build_loss_of_standby(name: str) -> Fault:
    """Kill the standby. No lease is confirmed until it is back."""

    async def inject(broker: ChaosBroker) -> None:
        await _get_pair(broker).standby.kill()

    async def heal(broker: ChaosBroker) -> None:
        await _get_pair(broker).standby.start()
        await _get_pair(broker).wait_until_in_sync()

    return Fault(
        kind=name, name=name, affects=frozenset({"PostgreSQL"}), inject=inject, heal=heal, duration_sec=DOWN_SEC
    )


def _build_fault(
    name: str,
    server: str,
    inject: Callable[[ChaosBroker], Awaitable[None]],
    heal: Callable[[ChaosBroker], Awaitable[None]],
    duration_sec: float,
    served_within_sec: float,
) -> Fault:
    return Fault(
        kind=name,
        name=name,
        affects=frozenset({server}),
        inject=inject,
        heal=heal,
        duration_sec=duration_sec,
        served_within_sec=served_within_sec,
        has_standby=True,
    )


def _get_cluster(broker: ChaosBroker) -> RabbitMQCluster:
    assert broker.servers.cluster is not None
    return broker.servers.cluster


def _get_pair(broker: ChaosBroker) -> PostgresPair:
    assert broker.servers.pair is not None
    return broker.servers.pair


async def _start_nodes(broker: ChaosBroker, nodes: list[PrivateRabbitMQ]) -> None:
    for node in nodes:
        await node.start()
    nodes.clear()
    await _get_cluster(broker).wait_until_complete()


async def _kill_primary(pair: PostgresPair) -> None:
    await pair.primary.kill()


async def _freeze_primary(pair: PostgresPair) -> None:
    pair.primary.freeze()
