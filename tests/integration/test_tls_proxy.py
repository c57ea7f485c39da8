"""deploy/haproxy/haproxy.cfg in a real HAProxy, in front of a gateway."""

import csv
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass

import httpx
import pytest

from devstack import packages
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.private import wait_until
from devstack.processes import spawn
from devstack.testing import NewDatabase, NewVhost
from tests.integration.reverse_proxies import make_certificate, replace_once
from tests.integration.stack import ADMIN, ROOT, run_stack, track_headers

CONFIGURATION = ROOT / "deploy" / "haproxy" / "haproxy.cfg"
OPERATOR = "127.0.0.4"
STUDENT = "127.0.0.2"
ANOTHER_STUDENT = "127.0.0.3"

STATES = """
frontend states
    bind 127.0.0.1:{port}
    stats enable
    stats uri /
"""


@dataclass(frozen=True, slots=True)
class Front:
    """HAProxy as a client sees it."""

    url: str
    states_url: str
    trust: ssl.SSLContext

    def client(self, address: str) -> httpx.AsyncClient:
        """Return a client with this address."""
        transport = httpx.AsyncHTTPTransport(local_address=address, verify=self.trust)
        return httpx.AsyncClient(base_url=self.url, transport=transport, timeout=30)

    async def counts(self) -> Mapping[str, str]:
        """Return the counters of the gateway behind HAProxy, by the names of its CSV."""
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            answer = await client.get(f"{self.states_url}/;csv")
        rows = csv.DictReader(answer.text.removeprefix("# ").splitlines())
        return next(row for row in rows if (row["pxname"], row["svname"]) == ("gateway", "gateway"))


@pytest.fixture(scope="module")
async def front(
    new_database: NewDatabase, new_vhost: NewVhost, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Front]:
    folder = tmp_path_factory.mktemp("haproxy")
    certificate = await make_certificate(folder)
    program = await packages.find_or_install(["haproxy"], "haproxy", Terminal())
    settings = {"TRUSTED_PROXIES": "127.0.0.1", "RATE_LIMIT": "200/minute"}
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=settings) as stack,
    ):
        await stack.fill(10)
        port, states_port = free_port(), free_port()
        file = folder / "haproxy.cfg"
        file.write_text(
            replace_once(
                CONFIGURATION.read_text(),
                {
                    "bind :443 ssl crt /etc/haproxy/broker.pem": f"bind 127.0.0.1:{port} ssl crt {certificate}",
                    "acl operator src 10.0.0.0/8": f"acl operator src {OPERATOR}",
                    "server gateway 127.0.0.1:8080": f"server gateway {stack.url.removeprefix('http://')}",
                    **({} if os.geteuid() == 0 else {"    user haproxy\n    group haproxy\n": ""}),
                },
            )
            + STATES.format(port=states_port)
        )
        process = await spawn("haproxy", [program, "-db", "-f", file])
        found = Front(
            f"https://localhost:{port}",
            f"http://127.0.0.1:{states_port}",
            ssl.create_default_context(cafile=str(folder / "certificate.pem")),
        )

        async def answers() -> str | None:
            try:
                await found.counts()
            except httpx.HTTPError as error:
                return f"{type(error).__name__} {error}"
            return None

        try:
            await wait_until(answers, process, "HAProxy")
            yield found
        finally:
            await process.stop()


async def test_a_student_is_served_over_tls(front: Front) -> None:
    async with front.client(STUDENT) as client:
        lease = await client.post("/v1/allocate", headers=track_headers("ada"))
        assert lease.status_code == 201, lease.text
        assert lease.headers["Strict-Transport-Security"] == "max-age=31536000"
        sandbox = await client.get(f"/v1/sandboxes/{lease.json()['sandbox_id']}", headers=track_headers("ada"))
        assert sandbox.status_code == 200
        released = await client.post(
            f"/v1/sandboxes/{lease.json()['sandbox_id']}/mark-for-deletion", headers=track_headers("ada")
        )
        assert released.status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/admin/stats",
        "/v1/%61dmin/stats",
        "/v1/sandboxes/../admin/stats",
        "/v1/sandboxes/%2e%2e/admin/stats",
        "//v1/admin/stats",
        "/v1/docs",
        "/metrics",
        "/healthz",
        "/readyz",
    ],
)
async def test_students_reach_the_track_routes_only(front: Front, path: str) -> None:
    async with front.client(STUDENT) as client:
        # httpx would resolve the dots.
        request = client.build_request("GET", "/", headers=ADMIN, extensions={"target": path.encode()})
        assert (await client.send(request)).status_code == 404


async def test_an_operator_reaches_the_admin_api_and_no_metrics(front: Front) -> None:
    async with front.client(OPERATOR) as client:
        assert (await client.get("/v1/admin/stats", headers=ADMIN)).status_code == 200
        assert (await client.get("/v1/docs")).status_code == 200
        assert (await client.get("/metrics")).status_code == 404


async def test_the_gateway_counts_the_address_that_haproxy_saw_and_no_other(front: Front) -> None:
    async def status(client: httpx.AsyncClient, number: int) -> int:
        headers = {"X-Forwarded-For": f"198.51.100.{number}", "Authorization": "Bearer of-nobody-at-all"}
        return (await client.post("/v1/allocate", headers=headers)).status_code

    async with front.client("127.0.0.5") as guessing, front.client(ANOTHER_STUDENT) as another:
        found = {await status(guessing, number) for number in range(1, 41)}
        assert found == {401, 429}
        assert await status(another, 1) == 401


async def test_connections_to_the_gateway_are_used_again_for_other_clients(front: Front) -> None:
    before = await front.counts()
    for number in range(20):
        async with front.client(STUDENT) as client:
            assert (
                await client.get("/v1/sandboxes/0", headers=track_headers(f"student-{number}"))
            ).status_code == 404
    after = await front.counts()
    opened = int(after["connect"]) - int(before["connect"])
    reused = int(after["reuse"]) - int(before["reuse"])
    assert opened + reused >= 20
    assert reused > opened
