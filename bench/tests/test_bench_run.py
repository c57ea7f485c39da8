"""`python -m bench` as a whole, at its smallest."""

import json
import os
import signal
import sys
from pathlib import Path

import asyncpg
import pytest

from devstack.infrastructure import Found
from devstack.processes import run, spawn
from devstack.settings import ROOT

SMALLEST = ["--seconds", "1", "--warm-up", "1", "--repeats", "1", "--students", "20"]


@pytest.mark.timeout(400)
async def test_the_smallest_run_of_each_kind_keeps_every_promise_and_tells_its_figures(
    servers: tuple[Found, Found], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    chosen = ["ours-1", "baseline-1", "class-start", "repeat", "prefix-20", "beside", "slow", "long"]
    sizes = ["--accounts", "5000", "--cycles", "2000"]
    code, said = await run(
        [sys.executable, "-m", "bench", *chosen, *SMALLEST, *sizes, "--json", path], cwd=ROOT, timeout=390
    )
    assert code == 0, said
    assert "req/s" in said
    assert "class start, slowest (ms)" in said
    figures = json.loads(path.read_text())
    rows = figures["rows"]
    assert rows["ours-1"]["cpu"]["server"] > 0
    assert figures["runs"]["class-start"][0]["load"]["requests"] == 20
    assert rows["sync-beside"]["more"]["sync s"] > 0
    assert rows["expiry-beside"]["more"]["expiry s"] > 0
    assert rows["purge-beside"]["more"]["purge s"] > 0
    assert rows["long"]["more"]["cycles"] >= 2_000


async def test_what_is_stopped_half_way_leaves_no_database(servers: tuple[Found, Found]) -> None:
    found, _ = servers
    url = found.url if found.given else f"{found.url}/postgres"
    process = await spawn(
        "bench",
        [sys.executable, "-m", "bench", "ours-1", *SMALLEST],
        env={**os.environ, "DATABASE_URL": url},
        cwd=ROOT,
    )
    admin = await asyncpg.connect(url)

    async def databases() -> int:
        names = f"broker_bench_{process.pid}_%"
        return int(await admin.fetchval("SELECT count(*) FROM pg_database WHERE datname LIKE $1", names))

    try:
        while not await databases():
            assert process.running, list(process.tail)
        process.send(signal.SIGINT)
        assert await process.wait() == 130, list(process.tail)
        assert await databases() == 0
    finally:
        await process.stop()
        await admin.close()
