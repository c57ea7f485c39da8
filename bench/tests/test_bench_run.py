"""`python -m bench` from start to end, with the smallest sizes."""

import json
import os
import signal
import sys
from pathlib import Path

import asyncpg
import pytest

from devstack.infrastructure import Server
from devstack.processes import run, spawn
from devstack.settings import ROOT

SMALLEST = ["--seconds", "1", "--warm-up", "1", "--repeats", "1", "--students", "20"]


@pytest.mark.timeout(400)
async def test_a_run_of_each_kind_of_scenario_succeeds_and_writes_its_figures(
    servers: tuple[Server, Server], tmp_path: Path
) -> None:
    path = tmp_path / "figures.json"
    names = [
        "ours-1",
        "baseline-1",
        "class-start",
        "repeat",
        "policies",
        "quotas-500",
        "prefix-20",
        "waiting",
        "beside",
        "slow",
    ]
    sizes = ["--accounts", "20000", "--cycles", "2000"]
    code, output = await run(
        [sys.executable, "-m", "bench", *names, "long", *SMALLEST, *sizes, "--json", path], cwd=ROOT, timeout=390
    )
    assert code == 0, output
    assert "req/s" in output
    assert "class start, slowest (ms)" in output
    figures = json.loads(path.read_text())
    results = figures["rows"]
    assert results["ours-1"]["cpu"]["server"] > 0
    assert figures["runs"]["class-start"][0]["load"]["requests"] == 20
    assert results["sync-beside"]["more"]["sync s"] > 0
    assert results["expiry-beside"]["more"]["expiry s"] > 0
    assert results["purge-beside"]["more"]["purge s"] > 0
    assert results["replace-beside"]["more"]["replacement p95 ms"] > 0
    assert results["long"]["more"]["cycles"] >= 2_000


async def test_an_interrupted_benchmark_drops_its_databases(servers: tuple[Server, Server]) -> None:
    postgres, _ = servers
    url = postgres.url if postgres.user_supplied else f"{postgres.url}/postgres"
    process = await spawn(
        "bench",
        [sys.executable, "-m", "bench", "ours-1", *SMALLEST],
        env={**os.environ, "DATABASE_URL": url},
        cwd=ROOT,
    )
    admin = await asyncpg.connect(url)

    async def count_databases() -> int:
        names = f"broker_bench_{process.pid}_%"
        return int(await admin.fetchval("SELECT count(*) FROM pg_database WHERE datname LIKE $1", names))

    try:
        while not await count_databases():
            assert process.running, list(process.tail)
        process.send(signal.SIGINT)
        assert await process.wait() == 130, list(process.tail)
        assert await count_databases() == 0
    finally:
        await process.stop()
        await admin.close()
