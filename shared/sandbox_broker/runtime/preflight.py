"""Preflight: check before the start that RabbitMQ and the database answer."""

import asyncio
from urllib.parse import urlsplit

from aiormq.exceptions import AMQPError, AuthenticationError, InvalidFrameError, ProbableAuthenticationError

from sandbox_broker.messaging.connection import open_connection
from sandbox_broker.runtime import event_loop
from sandbox_broker.runtime.server_urls import format_amqp_servers, split_amqp_urls
from sandbox_broker.runtime.settings import stop

PATIENCE_SEC = 5.0
"""Time limit for RabbitMQ and PostgreSQL to start beside the service."""


def check(*, amqp_url: str, database_url: str | None = None) -> None:
    """Exit with status 2 and one line that names the setting of each server that does not answer."""
    problems = event_loop.run(_problems(amqp_url, database_url))
    if problems:
        stop("; ".join(problems))


async def _problems(amqp_url: str, database_url: str | None) -> list[str]:
    checks = {"AMQP_URL": _amqp_problem(amqp_url)}
    if database_url is not None:
        from sandbox_broker.database import connections  # noqa: PLC0415 (saves a third of the start time of services without a database)

        checks["DATABASE_URL"] = connections.find_problem(database_url, patience_sec=PATIENCE_SEC)
    problems = await asyncio.gather(*checks.values())
    return [f"{name}: {problem}" for name, problem in zip(checks, problems, strict=True) if problem]


async def _amqp_problem(amqp_url: str) -> str | None:
    address = format_amqp_servers(amqp_url)
    deadline = asyncio.get_running_loop().time() + PATIENCE_SEC
    while True:
        try:
            left = deadline - asyncio.get_running_loop().time()
            async with open_connection(amqp_url, timeout=max(left, 0.1)):
                return None
        except (AuthenticationError, ProbableAuthenticationError):
            return f"RabbitMQ at {address} refuses this user and password"
        except (AMQPError, OSError, TimeoutError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, InvalidFrameError) and "OpenOk" in text:  # RabbitMQ closes the connection instead
                paths = sorted({urlsplit(url).path or "/" for url in split_amqp_urls(amqp_url)})
                return f"RabbitMQ at {address} refuses the virtual host {', '.join(map(repr, paths))}"
            if asyncio.get_running_loop().time() > deadline:
                return f"no RabbitMQ answers at {address} ({text})"
            await asyncio.sleep(0.2)
