"""RabbitMQ and PostgreSQL of a round: one server each, or a cluster of three nodes and a primary with a standby.

The servers of a cluster have proxies on the links between the nodes and from the clients to each node.
"""

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from devstack.postgres import PrivatePostgres
from devstack.postgres_pair import PostgresPair
from devstack.rabbitmq import PrivateRabbitMQ
from devstack.rabbitmq_cluster import RabbitMQCluster
from tests.chaos.disk import Disk, MountError
from tests.chaos.proxy import Proxy


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    postgres: PrivatePostgres
    rabbitmq: PrivateRabbitMQ
    disk: Disk | None = None
    """Disk of PostgreSQL, if a tmpfs can be mounted."""
    pair: PostgresPair | None = None
    cluster: RabbitMQCluster | None = None
    peer_links: dict[tuple[PrivateRabbitMQ, PrivateRabbitMQ], Proxy] = field(default_factory=dict)
    """Link from a node of the cluster to another."""
    client_links: dict[PrivateRabbitMQ, Proxy] = field(default_factory=dict)
    """Link from all clients to a node of the cluster."""

    @property
    def amqp_ports(self) -> list[int]:
        if self.cluster is None:
            return [self.rabbitmq.port]
        return [self.client_links[node].port for node in self.cluster.nodes]

    @property
    def postgres_ports(self) -> list[int]:
        return [self.postgres.port] if self.pair is None else self.pair.ports

    @property
    def amqp_url(self) -> str:
        return self.build_amqp_url(self.amqp_ports)

    @property
    def database_url(self) -> str:
        return self.build_database_url(self.postgres_ports)

    def build_amqp_url(self, ports: Sequence[int]) -> str:
        """Return an AMQP_URL with these ports, for example those of proxies."""
        return ",".join(self.rabbitmq.build_url(port) for port in ports)

    def build_database_url(self, ports: Sequence[int]) -> str:
        """Return a DATABASE_URL with these ports."""
        if self.pair is not None:
            return self.pair.build_url(ports)
        return self.postgres.url.replace(f":{self.postgres.port}/", f":{ports[0]}/")


async def start_single_servers(resources: AsyncExitStack) -> Servers:
    disk = await _mount_disk(resources)
    postgres = await resources.enter_async_context(PrivatePostgres(within=None if disk is None else disk.path))
    rabbitmq = await resources.enter_async_context(PrivateRabbitMQ())
    return Servers(postgres=postgres, rabbitmq=rabbitmq, disk=disk)


async def start_cluster(resources: AsyncExitStack, *, net_ticktime_sec: int) -> Servers:
    """Start the cluster and the pair."""
    pair = await resources.enter_async_context(PostgresPair())
    cluster = RabbitMQCluster(net_ticktime_sec=net_ticktime_sec)
    peer_links = {
        (node, peer): await resources.enter_async_context(Proxy(port))
        for (node, peer), port in cluster.peer_ports.items()
    }
    for pair_of_nodes, link in peer_links.items():
        cluster.peer_ports[pair_of_nodes] = link.port
    client_links = {node: await resources.enter_async_context(Proxy(node.port)) for node in cluster.nodes}
    await resources.enter_async_context(cluster)
    return Servers(
        postgres=pair.primary,
        rabbitmq=cluster.nodes[0],
        pair=pair,
        cluster=cluster,
        peer_links=peer_links,
        client_links=client_links,
    )


async def _mount_disk(resources: AsyncExitStack) -> Disk | None:
    try:
        return await resources.enter_async_context(Disk())
    except MountError:
        return None
