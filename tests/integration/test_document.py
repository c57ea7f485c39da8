"""Conformance of the API with its OpenAPI document, tested with schemathesis.

The API accepts valid requests, refuses invalid ones, and responds only as described.
"""

import shutil
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from devstack.processes import run
from devstack.testing import NewDatabase, NewVhost
from tests.integration import hypothesis_settings
from tests.integration.stack import ADMIN_TOKEN, ROOT, TRACK_TOKEN, Stack, run_stack

CONFIGURATION = Path(__file__).with_name("schemathesis.toml")
RANDOM_CASES_PER_ROUTE = 5
"""schemathesis adds about 20 boundary cases per route."""
RANDOM_CASES_PER_ROUTE_AND_ROLE = 1

GRANTS: Mapping[str, dict[str, Any]] = {
    "viewer": {"role": "viewer"},
    "operator": {"role": "operator"},
    "scope": {"role": "track", "tracks": ["0"], "prefixes": ["sandbox-"], "max_active": 5},
}
"""Rights of the named tokens by name. The other test has tokens with all rights of a track and of an administrator.
test_gateway_tokens.py tries every role on every route.
"""

SETTINGS = {
    # Long time-outs, so that a 504 indicates a defect and not a busy machine.
    "ADMIN_WAIT_SEC": "60",
    "ALLOCATE_TIMEOUT_SEC": "60",
    # A stream has no end, so schemathesis would wait for ever. test_event_stream.py tests this route.
    "MAX_EVENT_STREAMS": "0",
}


@pytest.fixture
async def own_stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, settings=SETTINGS) as stack,
    ):
        await stack.fill(200)
        yield stack
        await stack.assert_sound()


@pytest.mark.timeout(hypothesis_settings.TIMEOUT_SEC)
async def test_the_api_conforms_to_its_openapi_document(own_stack: Stack, tmp_path: Path) -> None:
    options = [] if hypothesis_settings.RANDOM_CASES else ["--max-examples", str(RANDOM_CASES_PER_ROUTE)]
    await _search(own_stack, tmp_path, {"TRACK_TOKEN": TRACK_TOKEN, "ADMIN_TOKEN": ADMIN_TOKEN}, options)


@pytest.mark.timeout(hypothesis_settings.TIMEOUT_SEC)
async def test_a_token_of_each_role_may_use_its_routes_only(own_stack: Stack, tmp_path: Path) -> None:
    """Without random cases, send only few requests, because the boundary cases do not depend on the role."""
    options = ["--phases", "examples,fuzzing", "--max-examples", str(RANDOM_CASES_PER_ROUTE_AND_ROLE)]
    for name, grant in GRANTS.items():
        token = await own_stack.issue_token(name=name, **grant)
        environment = {"TRACK_TOKEN": token, "ADMIN_TOKEN": token, "CALLER_ROLE": grant["role"]}
        await _search(
            own_stack, tmp_path, environment, [] if hypothesis_settings.RANDOM_CASES else options, len(GRANTS)
        )


async def _search(
    own_stack: Stack, tmp_path: Path, tokens: Mapping[str, str], options: Sequence[str], runs: int = 1
) -> None:
    """Run schemathesis once, with its share of the random cases if there are `runs` of it."""
    document = (await own_stack.client.get(f"{own_stack.url}/v1/openapi.json")).json()
    routes = sum(len(methods) for methods in document["paths"].values())
    if hypothesis_settings.RANDOM_CASES:
        cases_per_route = -(-hypothesis_settings.RANDOM_CASES // (routes * runs))
        options = ["--max-examples", str(cases_per_route), "--seed", str(hypothesis_settings.SEED)]
    else:
        options = [*options, "--generation-deterministic"]
    rows = await own_stack.database.fetch("SELECT sandbox_id FROM sandboxes ORDER BY available_since, sandbox_id")
    shutil.copy(CONFIGURATION, tmp_path)
    (tmp_path / "sandboxes.txt").write_text("\n".join(f'"{row["sandbox_id"]}"' for row in rows[:10]))
    code, output = await run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "--no-color", "--config-file", CONFIGURATION.name),
            *("run", f"{own_stack.url}/v1/openapi.json", *options),
        ],
        env={
            **own_stack.environment,
            **tokens,
            "PYTHONPATH": str(ROOT),
        },
        cwd=tmp_path,
        timeout=hypothesis_settings.TIMEOUT_SEC or float("inf"),
    )
    assert code == 0, output
