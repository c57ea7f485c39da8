"""Load on PostgreSQL alone, made by its own pgbench: what a transaction per student costs at best."""

import os
import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

from bench import cpu
from bench.load import Load
from devstack import postgres
from devstack.errors import CannotRun
from devstack.processes import run

_HERE = Path(__file__).parent
_THREADS = 2


async def transactions(database_url: str, script: str, *, clients: int, seconds: int) -> Load:
    """Repeats the statement of `<script>.sql`, prepared, on so many connections."""
    binaries = postgres.binaries()
    program = "pgbench" if binaries is None else binaries / "pgbench"
    with cpu.of_children() as used:
        code, said = await run(
            [
                *(program, "--no-vacuum", "--protocol", "prepared", "--file", _HERE / f"{script}.sql"),
                *("--client", str(clients), "--jobs", str(min(_THREADS, clients)), "--time", str(seconds)),
            ],
            env=os.environ | _address(database_url),
            timeout=seconds + 60,
        )
    if code != 0:
        raise CannotRun(f"pgbench ended with exit code {code}: {said}", status=1)
    return parse(said, cpu_sec=used.seconds)


def parse(said: str, *, cpu_sec: float = 0.0) -> Load:
    done = _number(r"number of transactions actually processed: (\d+)", said)
    return Load(
        requests=int(done),
        seconds=done / _number(r"tps = ([\d.]+)", said),
        errors=int(_number(r"number of failed transactions: (\d+)", said)),
        cpu_sec=cpu_sec,
    )


def _number(pattern: str, said: str) -> float:
    found = re.search(pattern, said)
    if found is None:
        raise CannotRun(f"pgbench says nothing like {pattern!r}: {said}", status=1)
    return float(found[1])


def _address(database_url: str) -> dict[str, str]:
    """In the environment, where no list of processes shows the password."""
    parts = urlsplit(database_url)
    return {
        "PGHOST": parts.hostname or "",
        "PGPORT": str(parts.port or 5432),
        "PGUSER": unquote(parts.username or ""),
        "PGPASSWORD": unquote(parts.password or ""),
        "PGDATABASE": parts.path.removeprefix("/"),
    }
