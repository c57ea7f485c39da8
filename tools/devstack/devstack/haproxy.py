"""HAProxy in front of several gateways, for the test of a rolling restart."""

import csv
import tempfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from devstack import packages
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.private import wait_until
from devstack.processes import spawn

# HAProxy sends each request once, without a retry on the same or another server. It probes /readyz of each gateway.
# The time-outs allow for a busy machine.
_CONFIGURATION = """
global
    maxconn 2000
defaults
    mode http
    retries 0
    no option redispatch
    timeout connect 30s
    timeout client 60s
    timeout server 60s
    timeout check 30s
listen servers
    bind 127.0.0.1:{port}
    balance roundrobin
    option httpchk GET /readyz
    http-check expect status 200
    default-server check inter 100ms fall 1 rise 1
{servers}
listen states
    bind 127.0.0.1:{states_port}
    stats enable
    stats uri /
"""


@dataclass(frozen=True, slots=True)
class Proxy:
    url: str
    _states: str

    async def read_server_states(self) -> Mapping[str, Mapping[str, str]]:
        """Return HAProxy's statistics of each server, by the names of its CSV columns.

        Examples: `status`, `stot` (requests), `wretr` (retries).
        """
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            response = await client.get(f"{self._states}/;csv")
        response.raise_for_status()
        rows = csv.DictReader(response.text.removeprefix("# ").splitlines())
        return {row["svname"]: row for row in rows if row["pxname"] == "servers"}

    async def is_up(self, name: str) -> bool:
        return (await self.read_server_states())[name]["status"] == "UP"


@asynccontextmanager
async def start_haproxy(ports: Mapping[str, int], terminal: Terminal) -> AsyncIterator[Proxy]:
    """Run HAProxy in front of servers on this machine; `ports` is by server name. Raises CannotRun."""
    program = await packages.find_or_install(["haproxy"], "haproxy", terminal)
    port, states_port = free_port(), free_port()
    servers = "\n".join(f"    server {name} 127.0.0.1:{server_port}" for name, server_port in ports.items())
    proxy = Proxy(f"http://127.0.0.1:{port}", f"http://127.0.0.1:{states_port}")
    with tempfile.TemporaryDirectory(prefix="sandbox-broker-haproxy-") as directory:
        file = Path(directory) / "haproxy.cfg"
        file.write_text(_CONFIGURATION.format(port=port, servers=servers, states_port=states_port))
        process = await spawn("haproxy", [program, "-db", "-f", file])

        async def check() -> str | None:
            try:
                return None if await proxy.read_server_states() else "it has no servers"
            except httpx.HTTPError as error:
                return f"{type(error).__name__} {error}"

        try:
            await wait_until(check, process, "HAProxy")
            yield proxy
        finally:
            await process.stop()
