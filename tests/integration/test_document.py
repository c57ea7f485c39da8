"""The running API against its own OpenAPI document: what the document allows is accepted, what it forbids is
refused, and every answer is one that it describes."""

import shutil
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devstack.processes import run
from devstack.testing import NewDatabase, NewVhost
from tests.integration import search
from tests.integration.stack import ADMIN_TOKEN, ROOT, TRACK_TOKEN, Stack, running

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
CASES_OF_A_ROUTE = 10
"""By chance; about 20 more of each come from the bounds in the document."""

SETTINGS = {
    # A busy machine is no reason for a 504: then one says that something was not understood.
    "ADMIN_WAIT_SEC": "60",
    "ALLOCATE_TIMEOUT_SEC": "60",
}


@pytest.fixture
async def own_stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        running(database_url, amqp_url, settings=SETTINGS) as stack,
    ):
        await stack.fill(200)
        yield stack
        await stack.assert_sound()


@pytest.mark.timeout(search.TIMEOUT_SEC)
async def test_the_api_does_what_its_document_says(own_stack: Stack, tmp_path: Path) -> None:
    document = (await own_stack.client.get(f"{own_stack.url}/v1/openapi.json")).json()
    routes = sum(len(methods) for methods in document["paths"].values())
    if search.AMOUNT:
        effort = ["--max-examples", str(-(-search.AMOUNT // routes)), "--seed", str(search.SEED)]
    else:
        effort = ["--max-examples", str(CASES_OF_A_ROUTE), "--generation-deterministic"]
    known = await own_stack.database.fetch("SELECT sandbox_id FROM sandboxes ORDER BY available_since, sandbox_id")
    shutil.copy(CONFIGURATION, tmp_path)
    (tmp_path / "sandboxes.txt").write_text("\n".join(f'"{row["sandbox_id"]}"' for row in known[:10]))
    code, said = await run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", CONFIGURATION.name),
            *("run", f"{own_stack.url}/v1/openapi.json", *effort),
        ],
        env={
            **own_stack.environment,
            "TRACK_TOKEN": TRACK_TOKEN,
            "ADMIN_TOKEN": ADMIN_TOKEN,
            "PYTHONPATH": str(ROOT),
        },
        cwd=tmp_path,
        timeout=search.TIMEOUT_SEC or float("inf"),
    )
    assert code == 0, said
