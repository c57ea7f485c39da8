"""Servers of `make run CLUSTER=1`: a RabbitMQ cluster and a PostgreSQL pair, for trying the loss of a node.

A node that has ended is replaced, as an operator of a Kubernetes cluster would do.
"""

import asyncio
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

from devstack.infrastructure import Server
from devstack.output import Terminal
from devstack.postgres import PrivatePostgres
from devstack.postgres_pair import PostgresPair
from devstack.rabbitmq import PrivateRabbitMQ
from devstack.rabbitmq_cluster import RabbitMQCluster

RESTART_SEC = 20.0
"""Time from the end of a RabbitMQ node or of the standby to its restart."""
PROMOTE_SEC = 5.0
"""Time from the end of the primary to the promotion of the standby."""


@dataclass(frozen=True, slots=True)
class Cluster:
    rabbitmq: RabbitMQCluster
    postgres: PostgresPair

    @property
    def servers(self) -> tuple[Server, Server]:
        """PostgreSQL and RabbitMQ. The end of one of their processes does not end the run."""
        return Server(self.postgres.server_url), Server(self.rabbitmq.url)

    def summary_lines(self) -> Iterator[str]:
        yield "Every node is a process of its own. Kill or freeze one, and lease a sandbox meanwhile:"
        yield ""
        for number, node in enumerate(self.rabbitmq.nodes, 1):
            yield f"  {f'RabbitMQ {number}':<22} 127.0.0.1:{node.port}  kill -9 {_get_pid(node)}"
        primary, standby = self.postgres.primary, self.postgres.standby
        yield f"  {'PostgreSQL primary':<22} 127.0.0.1:{primary.port}  kill -9 {_get_pid(primary)}"
        yield f"  {'PostgreSQL standby':<22} 127.0.0.1:{standby.port}  kill -9 {_get_pid(standby)}"
        yield ""
        yield "kill -STOP freezes a RabbitMQ node, and kill -CONT resumes it."
        yield f"A killed node is started again after {RESTART_SEC:.0f} s. {PROMOTE_SEC:.0f} s after the end of the"
        yield "primary, the standby is promoted, and the former primary becomes its standby."
        yield ""

    async def replace_ended_nodes(self, terminal: Terminal) -> None:
        """Start ended nodes again, and promote the standby after the end of the primary, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for number, node in enumerate(self.rabbitmq.nodes, 1):
                tasks.create_task(self._restart_on_exit(f"RabbitMQ {number}", node, terminal))
            tasks.create_task(self._fail_over(terminal))

    async def _restart_on_exit(self, name: str, node: PrivateRabbitMQ, terminal: Terminal) -> None:
        while True:
            await _wait_for_exit(node)
            terminal.print_step(f"{name} has ended and is started again in {RESTART_SEC:.0f} s")
            await asyncio.sleep(RESTART_SEC)
            await node.start()
            terminal.print_step(f"{name} runs again: kill -9 {_get_pid(node)}")

    async def _fail_over(self, terminal: Terminal) -> None:
        while True:
            primary, standby = self.postgres.primary, self.postgres.standby
            exits = [asyncio.create_task(_wait_for_exit(server)) for server in (primary, standby)]
            try:
                await asyncio.wait(exits, return_when=asyncio.FIRST_COMPLETED)
                is_primary_lost = exits[0].done()
            finally:
                for task in exits:
                    task.cancel()
            if is_primary_lost:
                terminal.print_step(f"the primary has ended; its standby is promoted in {PROMOTE_SEC:.0f} s")
                await asyncio.sleep(PROMOTE_SEC)
                await self.postgres.promote()
                terminal.print_step(f"the standby is the primary: kill -9 {_get_pid(standby)}")
            else:
                terminal.print_step(
                    f"the standby has ended; no lease is confirmed until its return in {RESTART_SEC:.0f} s"
                )
                await asyncio.sleep(RESTART_SEC)
            await self.postgres.rebuild_standby()
            terminal.print_step(f"the new standby follows the primary: kill -9 {_get_pid(self.postgres.standby)}")


async def start_cluster(terminal: Terminal, stack: AsyncExitStack) -> Cluster:
    """Start the servers. They end with `stack`."""
    terminal.print_step("starting a RabbitMQ cluster and a PostgreSQL pair with temporary data")
    pair = await stack.enter_async_context(PostgresPair())
    return Cluster(await stack.enter_async_context(RabbitMQCluster()), pair)


def _get_pid(server: PrivateRabbitMQ | PrivatePostgres) -> int:
    assert server.process is not None
    return server.process.pid


async def _wait_for_exit(server: PrivateRabbitMQ | PrivatePostgres) -> None:
    assert server.process is not None
    await server.process.wait()
