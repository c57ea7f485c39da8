"""nginx and HAProxy with upstream keep-alive in front of one server, and the relay between them."""

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from devstack import packages
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.private import wait_until
from devstack.processes import run, spawn

SEGMENT_GAP_SEC = 0.01
"""Pause between two segments, so that the server reads them one by one. TCP does not report reads of the peer."""

# One worker and one idle upstream connection, so that the requests of all clients share it. A body goes upstream as
# it arrives.
_NGINX = """
daemon off;
worker_processes 1;
pid {directory}/nginx.pid;
error_log stderr error;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    upstream server {{
        server 127.0.0.1:{upstream};
        keepalive 1;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://server;
            proxy_http_version 1.1;
            proxy_request_buffering off;
            proxy_next_upstream off;
            proxy_set_header Host $http_host;
            {headers}
        }}
    }}
}}
"""
_NGINX_WEBSOCKET = 'proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection "upgrade";'
_NGINX_KEEP_ALIVE = 'proxy_set_header Connection "";'

_HAPROXY = """
global
    maxconn 200
    nbthread 1
defaults
    mode http
    retries 0
    option http-keep-alive
    timeout connect 30s
    timeout client 60s
    timeout server 60s
listen server
    bind 127.0.0.1:{port}
    http-reuse always
    server only 127.0.0.1:{upstream}
"""


class SegmentingRelay:
    """TCP relay that passes the first head of each read, and the bytes after it, in segments of their own.

    A network may cut a stream like that. Here it happens each time.
    """

    def __init__(self, upstream: int) -> None:
        self.port = 0
        self.connections = 0
        """Number of connections since the start."""
        self._upstream = upstream
        self._writers: set[asyncio.StreamWriter] = set()

    @asynccontextmanager
    async def listen(self) -> AsyncIterator["SegmentingRelay"]:
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for writer in self._writers:
                writer.transport.abort()
            await server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
        except OSError:
            writer.close()
            return
        both = {writer, upstream_writer}
        self._writers |= both
        try:
            await asyncio.gather(
                self._pass_on(reader, upstream_writer, cut=True),
                self._pass_on(upstream_reader, writer, cut=False),
            )
        finally:
            for one in both:
                one.transport.abort()
            self._writers -= both

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, cut: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                head, end, rest = data.partition(b"\r\n\r\n")
                if cut and rest:
                    writer.write(head + end)
                    await writer.drain()
                    await asyncio.sleep(SEGMENT_GAP_SEC)
                    data = rest
                writer.write(data)
                await writer.drain()
            writer.write_eof()


@asynccontextmanager
async def run_nginx(upstream: int, headers: str) -> AsyncIterator[int]:
    """Run nginx before the server on port `upstream` and yield its port. Raises CannotRun without nginx."""
    program = await packages.find_or_install(["nginx"], "nginx", Terminal())

    def command(directory: Path, port: int) -> list[str]:
        file = directory / "nginx.conf"
        file.write_text(_NGINX.format(directory=directory, port=port, upstream=upstream, headers=headers))
        return [program, "-p", str(directory), "-e", "stderr", "-c", str(file)]

    async with _run("nginx", command) as port:
        yield port


def run_haproxy(upstream: int) -> AbstractAsyncContextManager[int]:
    """Run HAProxy before the server on port `upstream` and yield its port. Raises CannotRun without HAProxy."""
    return run_haproxy_with(lambda port: _HAPROXY.format(port=port, upstream=upstream))


@asynccontextmanager
async def run_haproxy_with(configuration: Callable[[int], str]) -> AsyncIterator[int]:
    """Run HAProxy with the configuration for a port, and yield that port. Raises CannotRun without HAProxy."""
    program = await packages.find_or_install(["haproxy"], "haproxy", Terminal())

    def command(directory: Path, port: int) -> list[str]:
        file = directory / "haproxy.cfg"
        file.write_text(configuration(port))
        return [program, "-db", "-f", str(file)]

    async with _run("haproxy", command) as port:
        yield port


async def make_certificate(folder: Path) -> Path:
    """Return a file with a certificate for localhost and its key."""
    openssl = await packages.find_or_install(["openssl"], "openssl", Terminal())
    options = ["-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    options += ["-addext", "subjectAltName=DNS:localhost"]
    options += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    code, said = await run([openssl, "req", *options])
    assert code == 0, said
    both = folder / "broker.pem"
    both.write_text((folder / "certificate.pem").read_text() + (folder / "key.pem").read_text())
    return both


def replace_once(text: str, changes: Mapping[str, str]) -> str:
    """Return the text with the changes. Each key must occur once."""
    for before, after in changes.items():
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    return text


@asynccontextmanager
async def _run(name: str, command: Callable[[Path, int], list[str]]) -> AsyncIterator[int]:
    port = free_port()
    with tempfile.TemporaryDirectory(prefix=f"sandbox-broker-{name}-") as directory:
        process = await spawn(name, command(Path(directory), port))

        async def listens() -> str | None:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError as error:
                return str(error)
            writer.close()
            return None

        try:
            await wait_until(listens, process, name)
            yield port
        finally:
            await process.stop()


PROXIES: Mapping[str, Callable[[int], AbstractAsyncContextManager[int]]] = {
    "nginx for websockets": lambda upstream: run_nginx(upstream, _NGINX_WEBSOCKET),
    "nginx with keep-alive": lambda upstream: run_nginx(upstream, _NGINX_KEEP_ALIVE),
    "HAProxy": run_haproxy,
}
