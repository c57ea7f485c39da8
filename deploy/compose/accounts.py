"""Create the services' accounts in PostgreSQL and RabbitMQ, for docker-compose.yml. Permissions come from roles.sql
and definitions.json, passwords from the environment. Idempotent."""

import asyncio
import base64
import hashlib
import json
import os
import secrets
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import URLError

import asyncpg

DEPLOY = Path(__file__).parents[1]
POSTGRES = "postgresql://sandbox_broker@postgres:5432/sandbox_broker"
RABBITMQ = "http://rabbitmq:15672/api/definitions"
USER = "sandbox_broker"
"""Administrator of both servers, created by their images."""
ROLES = ("gateway", "allocator")
USERS = ("migration", "gateway", "allocator", "reaper", "csp-syncer", "provisioner")
API_TIMEOUT_SEC = 60
"""Wait for the management API, which starts later than RabbitMQ itself."""


async def create_roles() -> None:
    connection = await asyncpg.connect(POSTGRES, password=os.environ["POSTGRES_PASSWORD"])
    try:
        async with connection.transaction():
            await connection.execute((DEPLOY / "postgres" / "roles.sql").read_text())
            for name in ROLES:
                # ALTER ROLE does not support parameters.
                statement = await connection.fetchval(
                    "SELECT format('ALTER ROLE %I PASSWORD %L', $1::text, $2::text)",
                    f"sandbox_broker_{name}",
                    _read_password(name, "POSTGRES"),
                )
                await connection.execute(statement)
    finally:
        await connection.close()


def create_users() -> None:
    definitions: dict[str, Any] = json.loads((DEPLOY / "rabbitmq" / "definitions.json").read_text())
    for user in definitions["users"]:
        if user["name"] in USERS:
            user["password_hash"] = _hash_password(_read_password(user["name"], "RABBITMQ"))
            user["hashing_algorithm"] = "rabbit_password_hashing_sha256"
    token = base64.b64encode(f"{USER}:{os.environ['RABBITMQ_PASSWORD']}".encode()).decode()
    request = urllib.request.Request(
        RABBITMQ,
        data=json.dumps(definitions).encode(),
        headers={"Authorization": f"Basic {token}", "Content-Type": "application/json"},
    )
    deadline = time.monotonic() + API_TIMEOUT_SEC
    while True:
        try:
            urllib.request.urlopen(request, timeout=API_TIMEOUT_SEC).close()  # noqa: S310 (a constant address)
        except URLError as error:
            if time.monotonic() > deadline:
                raise
            sys.stdout.write(f"waiting for RabbitMQ: {error}\n")
            time.sleep(1)
        else:
            return


def _read_password(name: str, server: str) -> str:
    return os.environ[f"{name.upper().replace('-', '_')}_{server}_PASSWORD"]


def _hash_password(password: str) -> str:
    """Return the password hash in RabbitMQ's format: a salt of four bytes, then the digest of salt and password."""
    salt = secrets.token_bytes(4)
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


if __name__ == "__main__":
    asyncio.run(create_roles())
    create_users()
