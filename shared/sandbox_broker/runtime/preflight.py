"""What a service looks at before it starts: do the addresses it was given answer?"""

import asyncio
from urllib.parse import urlsplit

from aiormq.exceptions import AMQPError, AuthenticationError, InvalidFrameError, ProbableAuthenticationError

from sandbox_broker.messaging.connection import opened
from sandbox_broker.runtime.settings import stop

PATIENCE_SEC = 5.0
"""How long a server may take to come up beside us before we give up with a line that says so."""


def check(*, amqp_url: str, database_url: str | None = None) -> None:
    """Exits with status 2 and one line that names the variable of what does not answer."""
    problems = asyncio.run(_problems(amqp_url, database_url))
    if problems:
        stop("; ".join(problems))


async def _problems(amqp_url: str, database_url: str | None) -> list[str]:
    checks = {"AMQP_URL": _amqp_problem(amqp_url)}
    if database_url is not None:
        from sandbox_broker.database import connections  # noqa: PLC0415 (a third of the start of a service that has no database)

        checks["DATABASE_URL"] = connections.preflight(database_url, patience_sec=PATIENCE_SEC)
    problems = await asyncio.gather(*checks.values())
    return [f"{name}: {problem}" for name, problem in zip(checks, problems, strict=True) if problem]


async def _amqp_problem(amqp_url: str) -> str | None:
    parts = urlsplit(amqp_url)
    place = f"{parts.hostname}:{parts.port or 5672}"
    deadline = asyncio.get_running_loop().time() + PATIENCE_SEC
    while True:
        try:
            left = deadline - asyncio.get_running_loop().time()
            async with opened(amqp_url, timeout=max(left, 0.1)):
                return None
        except (AuthenticationError, ProbableAuthenticationError):
            return f"RabbitMQ at {place} refuses this user and password"
        except (AMQPError, OSError, TimeoutError) as error:
            text = " ".join(str(error).split()) or type(error).__name__
            if isinstance(error, InvalidFrameError) and "OpenOk" in text:  # it closes instead of opening
                return f"RabbitMQ at {place} refuses the virtual host {parts.path or '/'!r}"
            if asyncio.get_running_loop().time() > deadline:
                return f"no RabbitMQ answers at {place} ({text})"
            await asyncio.sleep(0.2)
