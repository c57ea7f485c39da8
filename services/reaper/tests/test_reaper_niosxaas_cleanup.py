"""Tests of niosxaas_cleanup.py in a clean-up run."""

from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from pydantic import ValidationError

from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD
from devstack.conditions import wait_until
from devstack.testing import empty_queues
from sandbox_broker.contract.commands import ClaimDeletions, RecordDeletion, RecordDeletionFailure

from .reaper_harness import Allocator, Csp, reaping, settings, simulated_csp


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=2) as csp:
        yield csp


@pytest.fixture
async def allocator(csp: Csp, amqp_url: str) -> AsyncIterator[Allocator]:
    await empty_queues(amqp_url)
    allocator = Allocator(csp)
    await allocator.add_due()
    async with allocator.consuming(amqp_url):
        yield allocator


def enabled_settings(csp: Csp, **changes: Any) -> dict[str, Any]:
    return {
        "niosxaas_enabled": True,
        "niosxaas_base_url": csp.url,
        "niosxaas_email": DEFAULT_EMAIL,
        "niosxaas_password": DEFAULT_PASSWORD,
        "cleanup_concurrency": 1,
        **changes,
    }


async def create_services(csp: Csp, names: Iterable[str]) -> None:
    services = {external_id: list(names) for external_id in (await csp.accounts()).values()}
    (await csp.control.put("/_control/services", json={"services": services})).raise_for_status()


async def list_services(csp: Csp) -> list[str]:
    services = (await csp.control.get("/_control/services")).json()["services"]
    return sorted(record["name"] for records in services.values() for record in records)


async def list_deletions(csp: Csp) -> list[str]:
    """Return the DELETE calls in order: `service` or `account`."""
    return ["account" if "/sandbox/accounts/" in call["path"] else "service" for call in await csp.deletions()]


async def test_services_are_deleted_before_the_account(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await create_services(csp, ["lab", "other"])
    async with reaping(amqp_url, csp, **enabled_settings(csp)):
        await wait_until(lambda: not allocator.due)
    assert await list_services(csp) == []
    assert await list_deletions(csp) == ["service", "service", "account"] * 2
    assert [command.services_error for command in allocator.all(RecordDeletion)] == [None, None]


async def test_only_services_of_the_given_name_are_deleted(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await create_services(csp, ["lab", "other"])
    async with reaping(amqp_url, csp, **enabled_settings(csp, niosxaas_service_name="lab")):
        await wait_until(lambda: not allocator.due)
    assert (await list_deletions(csp)).count("service") == 2


async def test_services_stay_in_shadow_mode(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await create_services(csp, ["lab"])
    async with reaping(amqp_url, csp, **enabled_settings(csp, niosxaas_shadow_mode=True)):
        await wait_until(lambda: not allocator.due)
    assert await list_deletions(csp) == ["account", "account"]


async def test_services_are_left_alone_by_default(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await create_services(csp, ["lab"])
    async with reaping(amqp_url, csp):
        await wait_until(lambda: not allocator.due)
    assert await list_deletions(csp) == ["account", "account"]


async def test_a_failed_removal_is_recorded_and_the_account_is_deleted(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await create_services(csp, ["lab"])
    await csp.behave(fail_next_deletes=1)
    async with reaping(
        amqp_url, csp, **enabled_settings(csp, niosxaas_password="wrong", deletion_backoff_base_sec=0.1)
    ):
        await wait_until(lambda: not allocator.due)
    assert await csp.accounts() == {}
    (failure,) = allocator.all(RecordDeletionFailure)
    errors = [failure.services_error, *(deletion.services_error for deletion in allocator.all(RecordDeletion))]
    assert len(errors) == 3
    assert all("401" in (error or "") for error in errors)


async def test_no_service_is_removed_when_the_account_switch_had_no_effect(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    (await csp.control.put("/_control/services", json={"services": {"home": ["keep"]}})).raise_for_status()
    await csp.behave(account_switch_without_effect=True)
    async with reaping(amqp_url, csp, **enabled_settings(csp)):
        await wait_until(lambda: not allocator.due)
    assert await list_services(csp) == ["keep"]
    assert await list_deletions(csp) == ["account", "account"]
    assert await csp.accounts() == {}
    for deletion in allocator.all(RecordDeletion):
        assert "Nothing was changed." in (deletion.services_error or "")


async def test_a_claim_includes_the_time_for_services(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with reaping(amqp_url, csp):
        await wait_until(lambda: allocator.all(ClaimDeletions))
    without = allocator.all(ClaimDeletions)[-1].claim_sec
    async with reaping(amqp_url, csp, **enabled_settings(csp), cleanup_interval_sec=0.1):
        await wait_until(lambda: allocator.all(ClaimDeletions)[-1].claim_sec == without + 30)


@pytest.mark.parametrize("missing", ["niosxaas_email", "niosxaas_password"])
def test_the_reaper_needs_a_user_when_the_removal_is_enabled(missing: str) -> None:
    user = {"niosxaas_email": "a@example.com", "niosxaas_password": "secret", missing: " "}
    with pytest.raises(ValidationError, match=missing):
        settings(niosxaas_enabled=True, **user)
    settings(niosxaas_enabled=False, **user)
