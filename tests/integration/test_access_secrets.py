"""Secrets of logins: CSP fails and repeats requests, and each password appears only in responses to its student.

This holds for the passwords of the students, that of the administrator, and the key that encrypts them.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from itertools import cycle
from typing import Any

import aio_pika
import httpx
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from csp_simulator.testing import serving
from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.testing import NewDatabase, NewVhost
from sandbox_broker.contract import topology
from tests.integration.otlp_collector import run_collector
from tests.integration.stack import PORTS, Stack, run_stack, track_headers

LOGIN_EMAIL, LOGIN_PASSWORD = "simulator@example.com", "simulator-password"
KEY = "c2FuZGJveC1icm9rZXItdGVzdC1rZXktMDEyMzQ1Njc="
STUDENTS = tuple(f"student-{number}" for number in range(6))

pytestmark = pytest.mark.timeout(300)


@asynccontextmanager
async def echoing_csp(simulator: str) -> AsyncIterator[str]:
    """Run a proxy of the simulator. It carries out every ninth call about sessions, groups and users, and answers
    with an error that repeats the request with its headers, and the response."""
    outcomes = cycle([outcome for failure in ("500", "401", "html") for outcome in (*["pass"] * 8, failure)])

    async def forward(request: Request) -> Response:
        body, url = await request.body(), f"{simulator}{request.url.path}"
        headers = {name: value for name, value in request.headers.items() if name not in ("host", "content-length")}
        query = request.query_params
        response = await client.request(request.method, url, headers=headers, content=body, params=query)
        outcome = "pass" if "accounts" in request.url.path else next(outcomes)
        if outcome == "pass":
            return Response(response.content, response.status_code, media_type="application/json")
        echo = f"{request.method} {request.url} {headers} {body.decode()} {response.text}"
        if outcome == "html":
            return Response(f"<html>{echo}</html>", 502, media_type="text/html")
        return Response(json.dumps({"error": [{"message": echo}]}), int(outcome), media_type="application/json")

    proxy = Starlette(routes=[Route("/{path:path}", forward, methods=["GET", "POST", "DELETE"])])
    async with httpx.AsyncClient(verify=False) as client, serving(proxy) as url:
        yield url


@asynccontextmanager
async def recorded_events(amqp_url: str) -> AsyncIterator[list[bytes]]:
    """Record every message of the exchanges for events and commands."""
    bodies: list[bytes] = []

    async def keep(message: aio_pika.abc.AbstractIncomingMessage) -> None:
        bodies.append(message.body)

    connection = await aio_pika.connect(amqp_url)
    async with connection, connection.channel() as channel:
        queue = await channel.declare_queue(exclusive=True)
        await queue.bind(topology.EVENTS.name, "#")
        for exchange in topology.EXCHANGES:
            if exchange.commands:
                for binding in topology.BINDINGS:
                    if binding.exchange is exchange:
                        await queue.bind(exchange.name, binding.routing_key)
        await queue.consume(keep, no_ack=True)
        yield bodies


async def test_secrets_of_logins_stay_secret(new_database: NewDatabase, new_vhost: NewVhost) -> None:
    lines: list[str] = []
    simulator_port = free_port()
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_collector() as collector,
        echoing_csp(f"http://127.0.0.1:{simulator_port}") as csp,
    ):
        settings = {
            "LOG_LEVEL": "DEBUG",
            "CSP_BASE_URL": f"{csp}/v2",
            "CSP_LOGIN_EMAIL": LOGIN_EMAIL,
            "CSP_LOGIN_PASSWORD": LOGIN_PASSWORD,
            "ACCESS_KEYS": KEY,
            "ACCESS_EMAIL_DOMAIN": "labs.example.com",
            "ACCESS_ATTEMPT_TIMEOUT_SEC": "3",
            "ACCESS_REMOVAL_WAIT_SEC": "20",
            "CIRCUIT_BREAKER_THRESHOLD": "1000",
            "CIRCUIT_BREAKER_TIMEOUT_SEC": "0.1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
            "OTEL_TRACES_SAMPLER_ARG": "1",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        async with run_stack(
            database_url,
            amqp_url,
            settings=settings,
            settings_of={"provisioner": {"LOG_FORMAT": "console"}},
            on_line=lambda process, line: lines.append(f"{process} {line}"),
            simulator_port=simulator_port,
        ) as stack:
            await stack.fill(len(STUDENTS))
            async with recorded_events(amqp_url) as messages:
                secrets = {LOGIN_PASSWORD, KEY, *(await _use_logins(stack))}
                assert len(secrets) == 2 + len(STUDENTS)
                await _cause_dead_letters(stack)
                await wait_until(partial(_is_logged, lines, "csp.login_failed"))
                surfaces = {
                    "logs": "\n".join(lines),
                    "messages": "\n".join(body.decode(errors="replace") for body in messages),
                    "traces": "\n".join(body.decode("latin-1") for body in collector.raw),
                    **await _read_pages(stack),
                    **await _read_tables(stack),
                }
    assert "RecordAccess" in surfaces["messages"]
    assert "access.ready" in surfaces["messages"]
    assert "create login" in surfaces["traces"]
    assert "ClaimAccess" in surfaces["table dead_letters"]
    assert "labs.example.com" in surfaces["table accesses"]
    leaks = [name for name, text in surfaces.items() if any(secret in text for secret in secrets)]
    assert leaks == []


async def _use_logins(stack: Stack) -> list[str]:
    """Let each student get a login, and some release it. Return the passwords."""
    passwords: list[str] = []
    for student in STUDENTS:
        lease = (await stack.allocate(student, X_Sandbox_Access="user")).json()
        url = f"{stack.url}/v1/sandboxes/{lease['sandbox_id']}/access"
        login: dict[str, Any] = {}

        async def is_ready(url: str = url, student: str = student, login: dict[str, Any] = login) -> bool:
            login.update((await stack.client.get(url, headers=track_headers(student))).json())
            return login.get("status") == "ready"

        await wait_until(is_ready)
        passwords.append(login["password"])
        if student in STUDENTS[:3]:
            await stack.release(lease["sandbox_id"], student)

    async def are_released_ones_gone() -> bool:
        return bool(
            await stack.database.fetchval("SELECT count(*) = 3 FROM accesses WHERE state IN ('removed', 'remains')")
        )

    await wait_until(are_released_ones_gone)
    return passwords


async def _cause_dead_letters(stack: Stack) -> None:
    """Let commands about logins fail for good, without an effect on the queries for metrics."""
    await stack.database.execute("ALTER TABLE accesses RENAME claim TO hidden_claim")

    kept = "SELECT count(*) > 0 FROM dead_letters WHERE 'ClaimAccess' = ANY (commands)"

    async def is_dead_letter_kept() -> bool:
        connection = await aio_pika.connect(stack.environment["AMQP_URL"])
        async with connection, connection.channel() as channel:
            exchange = await channel.get_exchange(topology.EVENTS.name)
            await exchange.publish(aio_pika.Message(b"{}"), "access.ended")  # wakes the provisioner
        return bool(await stack.database.fetchval(kept))

    await wait_until(is_dead_letter_kept, every_sec=0.5)
    await stack.database.execute("ALTER TABLE accesses RENAME hidden_claim TO claim")


async def _is_logged(lines: list[str], event: str) -> bool:
    return any(event in line for line in lines)


async def _read_pages(stack: Stack) -> dict[str, str]:
    """Return the metrics of each service, and the document of the API."""
    ports = {module: stack.environment[variable] for module, variable in PORTS.items()}
    pages = {f"metrics of {module}": f"http://127.0.0.1:{port}/metrics" for module, port in ports.items()}
    pages["API document"] = f"{stack.url}/v1/openapi.json"
    responses = await asyncio.gather(*map(stack.client.get, pages.values()))
    return {name: response.raise_for_status().text for name, response in zip(pages, responses, strict=True)}


async def _read_tables(stack: Stack) -> dict[str, str]:
    """Return the whole content of each table."""
    tables = await stack.database.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
    return {
        f"table {name}": "\n".join(
            row[0] for row in await stack.database.fetch(f"SELECT to_jsonb(t)::text FROM {name} t")
        )
        for (name,) in tables
    }
