"""RabbitMQ cluster of private nodes."""

import asyncio
import secrets
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Self

from devstack.rabbitmq import PrivateRabbitMQ

NET_TICKTIME_SEC = 8
"""Value of the Kubernetes component `rabbitmq-operator`."""
ADVANCED_CONFIGURATION = """
[
  {rabbit, [{consumer_disconnected_timeout, 1000}]},
  {aten, [{poll_interval, 1000}]},
  {kernel, [{net_setuptime, 2}]}
].
"""
"""Value of the Kubernetes component `rabbitmq-operator`. In rabbitmq.conf, the first one would be invalid before
RabbitMQ 4.3."""
_HOST = "127.0.0.1"
_SIZE = 3
_JOINED_SEC = 120.0
_ALIVE_REQUEST, _VISIBLE_NODE, _TCP, _PROTOCOL_VERSION = 120, 77, 0, (6, 5)
"""Numbers of the protocol of epmd."""

# These expressions are valid on RabbitMQ 3.10 and 4.x.
_COUNT_RUNNING = "length([Node || Node <- [node() | nodes()], rabbit:is_running(Node)])."
_FIND_LEADER = """
{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{queue}">>)),
{{_, Leader}} = amqqueue:get_pid(Queue), Leader.
"""
_DESCRIBE_QUEUES = """
Counts = [num_ready_messages, num_checked_out, num_consumers, num_enqueuers],
Describe = fun(State) ->
    {maps:with(Counts, rabbit_fifo:overview(State)), rabbit_fifo:query_single_active_consumer(State)}
end,
[{Name, ra:local_query({Name, node()}, Describe, 1000)}
 || Name <- [element(1, Row) || Row <- ets:tab2list(ra_state)], lists:prefix("%2F_", atom_to_list(Name))].
"""


class RabbitMQCluster:
    """Cluster of three private RabbitMQ nodes. The context manager starts it and removes all of its files on exit.

    Each node has its own port mapper (epmd). It answers a node that looks for `peer` with the port
    `peer_ports[node, peer]`, so that a proxy can be placed on each link between two nodes before the start.
    """

    def __init__(self, *, net_ticktime_sec: int = NET_TICKTIME_SEC) -> None:
        """`net_ticktime_sec` is the time after which a node considers a silent node down."""
        cookie = secrets.token_hex(16)
        self.nodes = tuple(
            PrivateRabbitMQ(cookie=cookie, advanced_configuration=ADVANCED_CONFIGURATION) for _ in range(_SIZE)
        )
        names = (f"cluster_formation.classic_config.nodes.{n} = {one.node}" for n, one in enumerate(self.nodes, 1))
        lines = (
            "cluster_formation.peer_discovery_backend = classic_config",
            *names,
            "cluster_formation.discovery_retry_limit = 3",  # the first node of RabbitMQ 4 would wait for minutes
            "cluster_partition_handling = pause_minority",
            f"net_ticktime = {net_ticktime_sec}",
        )
        for node in self.nodes:
            node.configuration = lines
        self.peer_ports = {(node, peer): peer.distribution_port for node, peer in self._list_pairs()}
        self._entries: list[asyncio.StreamWriter] = []

    @property
    def url(self) -> str:
        """Addresses of all nodes, in the form of AMQP_URL."""
        return ",".join(node.url for node in self.nodes)

    async def __aenter__(self) -> Self:
        try:
            await self.start()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Start all nodes. Returns when each is a member of the cluster."""
        for node in self.nodes:
            await node.start_mapper()
        for node, peer in self._list_pairs():
            self._entries.append(await _add_entry(node.mapper_port, peer.node, self.peer_ports[node, peer]))
        first, *others = self.nodes
        await first.start()  # before the others, because nodes without data that start together form two clusters
        await asyncio.gather(*(node.start() for node in others))
        await self.wait_until_complete()

    async def wait_until_complete(self) -> None:
        """Wait until all nodes run as one cluster. Raises TimeoutError after two minutes."""

        async def count_running() -> int:
            try:
                return int(await self.nodes[0].run_rabbitmqctl("eval", _COUNT_RUNNING))
            except RuntimeError:
                return 0  # the node is paused because it is in a minority

        async with asyncio.timeout(_JOINED_SEC):
            while await count_running() != _SIZE:
                pass  # each call takes seconds

    async def find_leader(self, queue: str) -> PrivateRabbitMQ:
        """Return the node with the leader of a quorum queue of the virtual host `/`."""
        name = await self._get_running().run_rabbitmqctl("eval", _FIND_LEADER.format(queue=queue))
        return next(node for node in self.nodes if node.node == name.strip().strip("'"))

    async def describe_queues(self) -> str:
        """Return messages, consumers and leader of each quorum queue of the virtual host `/`, in Erlang's notation.

        `rabbitmqctl list_queues` of RabbitMQ 3.10 would wait for a lost node.
        """
        return await self._get_running().run_rabbitmqctl("eval", _DESCRIBE_QUEUES)

    async def close(self) -> None:
        for node in self.nodes:
            node.thaw()  # a frozen node would not handle the signal
        await asyncio.gather(*(node.close() for node in self.nodes))
        for entry in self._entries:
            entry.close()
        self._entries.clear()

    def _get_running(self) -> PrivateRabbitMQ:
        return next(node for node in self.nodes if node.process is not None and node.process.running)

    def _list_pairs(self) -> Iterator[tuple[PrivateRabbitMQ, PrivateRabbitMQ]]:
        return ((node, peer) for node in self.nodes for peer in self.nodes if node is not peer)


async def _add_entry(mapper_port: int, node: str, port: int) -> asyncio.StreamWriter:
    """Add a node to a port mapper. The entry exists until the connection is closed."""
    name = node.partition("@")[0].encode()
    highest, lowest = _PROTOCOL_VERSION
    body = struct.pack("!BHBBHHH", _ALIVE_REQUEST, port, _VISIBLE_NODE, _TCP, highest, lowest, len(name)) + name
    body += struct.pack("!H", 0)
    reader, writer = await asyncio.open_connection(_HOST, mapper_port)
    writer.write(struct.pack("!H", len(body)) + body)
    answer = await reader.readexactly(2)
    if answer[1] != 0:
        writer.close()
        raise RuntimeError(f"epmd does not accept the node {node}")
    return writer
