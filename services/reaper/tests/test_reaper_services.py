"""The services inside a used sandbox are removed before its account is deleted, if that is wanted."""

from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from pydantic import ValidationError

from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD
from sandbox_broker.messages import ClaimDeletions, RecordDeletion, RecordDeletionFailure

from .reaper_harness import Allocator, Csp, emptied, reaping, settings, simulated_csp, until


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with simulated_csp(accounts=2) as csp:
        yield csp


@pytest.fixture
async def allocator(csp: Csp, amqp_url: str) -> AsyncIterator[Allocator]:
    await emptied(amqp_url)
    allocator = Allocator(csp)
    await allocator.add_due()
    async with allocator.consuming(amqp_url):
        yield allocator


def enabled(csp: Csp, **changes: Any) -> dict[str, Any]:
    return {
        "niosxaas_enabled": True,
        "niosxaas_base_url": csp.url,
        "niosxaas_email": DEFAULT_EMAIL,
        "niosxaas_password": DEFAULT_PASSWORD,
        "cleanup_concurrency": 1,
        **changes,
    }


async def have_services(csp: Csp, names: Iterable[str]) -> None:
    services = {external_id: list(names) for external_id in (await csp.accounts()).values()}
    (await csp.control.put("/_control/services", json={"services": services})).raise_for_status()


async def left(csp: Csp) -> list[str]:
    services = (await csp.control.get("/_control/services")).json()["services"]
    return sorted(record["name"] for records in services.values() for record in records)


async def calls(csp: Csp) -> list[str]:
    """The DELETE calls in order: `service` or `account`."""
    return ["account" if "/sandbox/accounts/" in call["path"] else "service" for call in await csp.deletions()]


async def test_services_go_before_the_account(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await have_services(csp, ["lab", "other"])
    async with reaping(amqp_url, csp, **enabled(csp)):
        await until(lambda: not allocator.due)
    assert await left(csp) == []
    assert await calls(csp) == ["service", "service", "account"] * 2
    assert [command.services_error for command in allocator.all(RecordDeletion)] == [None, None]


async def test_only_those_of_the_name_given_go(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await have_services(csp, ["lab", "other"])
    async with reaping(amqp_url, csp, **enabled(csp, niosxaas_service_name="lab")):
        await until(lambda: not allocator.due)
    assert (await calls(csp)).count("service") == 2


async def test_in_shadow_mode_they_stay(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await have_services(csp, ["lab"])
    async with reaping(amqp_url, csp, **enabled(csp, niosxaas_shadow_mode=True)):
        await until(lambda: not allocator.due)
    assert await calls(csp) == ["account", "account"]


async def test_off_by_default(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    await have_services(csp, ["lab"])
    async with reaping(amqp_url, csp):
        await until(lambda: not allocator.due)
    assert await calls(csp) == ["account", "account"]


async def test_their_failure_is_recorded_and_does_not_stop_the_deletion(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    await have_services(csp, ["lab"])
    await csp.behave(fail_next_deletes=1)
    async with reaping(amqp_url, csp, **enabled(csp, niosxaas_password="wrong", deletion_backoff_base_sec=0.1)):
        await until(lambda: not allocator.due)
    assert await csp.accounts() == {}
    (failure,) = allocator.all(RecordDeletionFailure)
    told = [failure.services_error, *(deletion.services_error for deletion in allocator.all(RecordDeletion))]
    assert len(told) == 3
    assert all("401" in (error or "") for error in told)


async def test_nothing_is_removed_where_the_switch_had_no_effect_and_the_deletion_goes_on(
    csp: Csp, allocator: Allocator, amqp_url: str
) -> None:
    (await csp.control.put("/_control/services", json={"services": {"home": ["keep"]}})).raise_for_status()
    await csp.behave(account_switch_without_effect=True)
    async with reaping(amqp_url, csp, **enabled(csp)):
        await until(lambda: not allocator.due)
    assert await left(csp) == ["keep"]
    assert await calls(csp) == ["account", "account"]
    assert await csp.accounts() == {}
    for deletion in allocator.all(RecordDeletion):
        assert "No service was deleted." in (deletion.services_error or "")


async def test_a_claim_spans_them_too(csp: Csp, allocator: Allocator, amqp_url: str) -> None:
    async with reaping(amqp_url, csp):
        await until(lambda: allocator.all(ClaimDeletions))
    without = allocator.all(ClaimDeletions)[-1].claim_sec
    async with reaping(amqp_url, csp, **enabled(csp), cleanup_interval_sec=0.1):
        await until(lambda: allocator.all(ClaimDeletions)[-1].claim_sec == without + 30)


@pytest.mark.parametrize("missing", ["niosxaas_email", "niosxaas_password"])
def test_enabled_without_a_user_it_does_not_start(missing: str) -> None:
    user = {"niosxaas_email": "a@example.com", "niosxaas_password": "secret", missing: " "}
    with pytest.raises(ValidationError, match=missing):
        settings(niosxaas_enabled=True, **user)
    settings(niosxaas_enabled=False, **user)
