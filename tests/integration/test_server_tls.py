"""URLs of deploy/k8s/create-secrets.sh with TLS: real servers behind a TLS proxy, with and without trust."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from devstack.testing import NewDatabase, NewVhost
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.connection import open_connection
from tests.integration.reverse_proxies import make_certificate

_SSL_REQUEST = 8
"""Length of the message with which a client of PostgreSQL asks for TLS."""


@pytest.fixture(scope="module")
async def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for localhost with its key."""
    return await make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
async def another_authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return await make_certificate(tmp_path_factory.mktemp("other"))


@asynccontextmanager
async def open_tls_proxy(certificate: Path, upstream_url: str, default_port: int) -> AsyncIterator[int]:
    """Yield the port of a proxy that terminates TLS. With PostgreSQL, TLS starts at the request of the client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    upstream = urlsplit(upstream_url)
    is_postgres = upstream.scheme == "postgresql"

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            if is_postgres:
                await reader.readexactly(_SSL_REQUEST)
                writer.write(b"S")
                await writer.start_tls(context)
            server_reader, server_writer = await asyncio.open_connection(
                upstream.hostname, upstream.port or default_port
            )
            await asyncio.gather(_copy(reader, server_writer), _copy(server_reader, writer))

    server = await asyncio.start_server(serve, "localhost", 0, ssl=None if is_postgres else context)
    async with server:
        yield server.sockets[0].getsockname()[1]
        server.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def test_amqp_url_verifies_the_server_with_the_authority_in_cafile(
    new_vhost: NewVhost, certificate: Path, another_authority: Path
) -> None:
    async with new_vhost() as url, open_tls_proxy(certificate, url, 5672) as port:
        parts = urlsplit(url)
        tls_url = f"amqps://{parts.username}:{parts.password}@localhost:{port}{parts.path}"

        async with open_connection(f"{tls_url}?cafile={certificate}", timeout=10) as connection:
            assert not connection.is_closed

        for query in (f"?cafile={another_authority}", ""):
            with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
                async with open_connection(f"{tls_url}{query}", timeout=10):
                    pass


async def test_database_url_verifies_the_server_with_the_authority_in_sslrootcert(
    new_database: NewDatabase, certificate: Path, another_authority: Path
) -> None:
    async with new_database() as url, open_tls_proxy(certificate, url, 5432) as port:
        parts = urlsplit(url)
        tls_url = f"postgresql://{parts.username}@localhost:{port}{parts.path}?sslmode=verify-full&sslrootcert="

        connection = await Primary(f"{tls_url}{certificate}").connect(
            application_name="test", statement_timeout_sec=10
        )
        await connection.close()

        with pytest.raises(OSError, match="CERTIFICATE_VERIFY_FAILED"):
            await Primary(f"{tls_url}{another_authority}").connect(
                application_name="test", statement_timeout_sec=10
            )
