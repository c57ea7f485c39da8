"""Client for the maintenance commands of the allocator, the only service that writes the pool."""

from collections.abc import Sequence
from dataclasses import dataclass

from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import Command, R
from sandbox_broker.contract.replies import Reply
from sandbox_broker.messaging.rpc_client import RpcClient


@dataclass(frozen=True, slots=True)
class MaintenanceClient:
    rpc_client: RpcClient
    timeout_sec: float
    """Longest wait for a reply, unless a request names another one."""

    async def request(self, command: Command[R], *, timeout_sec: float | None = None) -> R:
        """Send the command and return its reply. Raises CommandNotDone (see `RpcClient.request`)."""
        return await self.rpc_client.request(
            topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=timeout_sec or self.timeout_sec
        )

    async def request_all(self, commands: Sequence[Command], *, timeout_sec: float) -> tuple[Reply, ...]:
        """Send the commands in one envelope. Raises CommandNotDone (see `RpcClient.request_all`)."""
        return await self.rpc_client.request_all(topology.ALLOCATOR_MAINTENANCE, commands, timeout_sec=timeout_sec)
