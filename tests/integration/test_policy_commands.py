"""Policies with a running broker: brokerctl, the API, and the quota under load."""

import asyncio
from pathlib import Path

import pytest

from tests.integration.ctl import run_brokerctl
from tests.integration.stack import Stack

POLICIES = """\
- name: short
  match: {track_name: short-lab}
  lease_hours: 0.5
- name: small
  match: {track_prefix: small-}
  max_active: 20
"""


@pytest.fixture
def policy_file(tmp_path: Path) -> Path:
    path = tmp_path / "policies.yaml"
    path.write_text(POLICIES)
    return path


async def test_a_file_of_policies_is_checked_applied_and_shown(stack: Stack, policy_file: Path) -> None:
    planned = await run_brokerctl(stack, "policy", "apply", str(policy_file), "--dry-run")
    assert planned.status == 0
    assert "nothing was changed" in planned.out
    assert "short-lab" in planned.out
    assert "[]" in (await run_brokerctl(stack, "policy", "show")).out

    applied = await run_brokerctl(stack, "policy", "apply", str(policy_file), "--json")
    assert [(change["name"], change["change"]) for change in applied.json["changes"]] == [
        ("short", "added"),
        ("small", "added"),
    ]
    lease = (await stack.allocate("ada", X_Instruqt_Track_ID="short-lab")).json()
    assert lease["expires_at"] - lease["allocated_at"] == 1800
    assert "the same" in (await run_brokerctl(stack, "policy", "apply", str(policy_file))).out

    shown = (await run_brokerctl(stack, "policy", "show")).out
    policy_file.write_text(shown.replace("max_active: 20", "max_active: many"))
    refused = await run_brokerctl(stack, "policy", "apply", str(policy_file))
    assert refused.status == 1
    line = next(number for number, text in enumerate(shown.splitlines(), 1) if "max_active" in text)
    assert f"policies.yaml:{line}: policies.1.max_active: must be a whole number" in refused.err
    assert (await run_brokerctl(stack, "policy", "show")).out == shown


async def test_a_quota_is_exact_under_concurrent_requests(stack: Stack, policy_file: Path) -> None:
    await run_brokerctl(stack, "policy", "apply", str(policy_file))
    responses = await asyncio.gather(
        *(stack.allocate(f"student-{number}", X_Instruqt_Track_ID="small-lab") for number in range(100))
    )
    refused = [response for response in responses if response.status_code != 201]
    assert len(responses) - len(refused) == 20
    assert {response.json()["detail"]["code"] for response in refused} == {"QUOTA_EXCEEDED"}
    assert {response.headers["Retry-After"] for response in refused} == {"30"}
    assert (await stack.allocate("ada")).status_code == 201
    await stack.assert_sound()
