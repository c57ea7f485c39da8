"""ApplyPolicies: the difference, its event, and repetitions."""

import json

import pytest

from allocator.handlers import policies
from allocator.routing import MAINTENANCE
from allocator.sql import policies as policies_sql
from allocator.write_session import ConcurrentUpdate, WriteSession
from sandbox_broker.contract.commands import ApplyPolicies
from sandbox_broker.contract.policies import Policy, StockRule
from sandbox_broker.contract.replies import PoliciesApplied, PolicyChange

from .allocator_harness import Pool

LONG = Policy(name="long", lease_hours=8)
STOCK = Policy(name="stock", stock=StockRule(name_prefix="lab-", min=1, max=2))


@pytest.fixture
async def session(pool: Pool) -> WriteSession:
    return await pool.write_session(lane=MAINTENANCE)


async def apply(session: WriteSession, *wanted: Policy, dry_run: bool = False) -> list[tuple[object, ...]]:
    command = ApplyPolicies(request_id="request", policies=wanted, dry_run=dry_run)
    reply = await policies.apply_policies(session, command)
    assert isinstance(reply, PoliciesApplied)
    return [(change.name, change.change, change.fields) for change in reply.changes]


async def documents(pool: Pool) -> list[dict[str, object]]:
    return [json.loads(document) for document in await pool.column("SELECT document FROM policies ORDER BY name")]


async def versions(pool: Pool) -> set[int]:
    return set(
        await pool.column(
            "SELECT version FROM policy_set UNION ALL "
            "SELECT policy_version FROM allocator_epoch WHERE queue = 'allocator.commands'"
        )
    )


async def test_policies_are_replaced_as_a_whole(pool: Pool, session: WriteSession) -> None:
    assert await apply(session, STOCK, LONG) == [
        ("long", "added", ("lease_hours",)),
        ("stock", "added", ("stock",)),
    ]
    assert await documents(pool) == [LONG.to_document(), STOCK.to_document()]
    assert await apply(session, Policy(name="long", max_active=1)) == [
        ("long", "changed", ("max_active", "lease_hours")),
        ("stock", "removed", ("stock",)),
    ]
    assert await documents(pool) == [{"name": "long", "max_active": 1}]
    assert await apply(session) == [("long", "removed", ("max_active",))]
    assert await documents(pool) == []


async def test_a_repeated_command_changes_nothing(pool: Pool, session: WriteSession) -> None:
    await apply(session, LONG, STOCK)
    before = await pool.state()
    assert await apply(session, STOCK, LONG) == []
    assert await pool.state() == before


async def test_a_dry_run_answers_the_difference(pool: Pool, session: WriteSession) -> None:
    before = await pool.state()
    assert await apply(session, LONG, dry_run=True) == [("long", "added", ("lease_hours",))]
    assert await pool.state() == before


async def test_a_change_is_announced_with_its_version(pool: Pool, session: WriteSession) -> None:
    await apply(session, LONG)
    await apply(session, LONG, dry_run=True)
    await apply(session, LONG)
    (version,) = await versions(pool)
    events = await pool.rows("SELECT type, subject, data FROM outbox")
    assert [(row["type"], row["subject"]) for row in events] == [("policy.changed", None)]
    assert json.loads(events[0]["data"]) == {
        "version": version,
        "changes": [{"name": "long", "change": "added", "fields": ["lease_hours"]}],
    }
    await apply(session)
    assert await versions(pool) == {version + 1}


async def test_a_quota_keeps_its_count_of_grants(pool: Pool, session: WriteSession) -> None:
    await apply(session, LONG, STOCK)
    await pool.execute("UPDATE policies SET quota_grants = 7")
    await apply(session, Policy(name="long", lease_hours=9), STOCK)
    assert await pool.column("SELECT quota_grants FROM policies") == [7, 7]


async def test_changes_against_earlier_policies_are_not_applied(pool: Pool, session: WriteSession) -> None:
    applied = await policies_sql.read_policies(session)
    await apply(session, LONG)
    before = await pool.state()
    change = PolicyChange(name="stock", change="added", fields=("stock",))
    with pytest.raises(ConcurrentUpdate):
        await policies_sql.apply_policies(session, [STOCK], changes=[change], version=applied.version)
    assert await pool.state() == before


async def test_stock_rules_are_readable_in_sql(pool: Pool, session: WriteSession) -> None:
    await apply(session, LONG, STOCK)
    assert [tuple(row) for row in await pool.rows("SELECT * FROM stock_rules")] == [("stock", "lab-", 1, 2, None)]
