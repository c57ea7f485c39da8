"""Generic plans of the statements for students.

The plans must be look-ups along the same indexes, whatever rows and statistics the tables had at planning time.
"""

import json
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest

from allocator.sql import allocations, lease_changes, leases, waiting

from .allocator_harness import Pool

_REQUESTS = (
    "ARRAY[0], ARRAY['holder'], ARRAY['track'], ARRAY['lab-'], ARRAY['lab.'], ARRAY[NULL::text], ARRAY[1], "
    "ARRAY['active']"
)
_TERMS = (
    "ARRAY['policy'], ARRAY[14400], ARRAY[14400], ARRAY[86400], ARRAY[1], ARRAY['token'], ARRAY[NULL::bytea], "
    "ARRAY[true], ARRAY['[\"user\"]']"
)
_QUOTA = "ARRAY[100], ARRAY['0123456789abcdef'], ARRAY['token'], ARRAY[100], ARRAY[100], ARRAY[100]"
STATEMENTS = {
    "any": (allocations.ALLOCATE_ANY, f"1, 0, {_REQUESTS}, {_TERMS}"),
    "by prefix": (allocations.ALLOCATE_BY_PREFIX, f"1, 0, {_REQUESTS}, {_TERMS}"),
    "any with quota": (allocations.WITH_QUOTA[allocations.ALLOCATE_ANY], f"1, 0, {_REQUESTS}, {_TERMS}, {_QUOTA}"),
    "by prefix with quota": (
        allocations.WITH_QUOTA[allocations.ALLOCATE_BY_PREFIX],
        f"1, 0, {_REQUESTS}, {_TERMS}, {_QUOTA}",
    ),
    "release": (
        leases.RELEASE,
        "1, ARRAY[0], ARRAY['1'], ARRAY['holder'], ARRAY['request'], ARRAY[NULL::text], ARRAY[NULL::bytea], "
        "ARRAY[NULL::text], '\\x00'",
    ),
    "chosen": (allocations.ALLOCATE_CHOSEN, f"1, 0, {_REQUESTS}, {_TERMS}, ARRAY['1']"),
    "chosen with quota": (
        allocations.WITH_QUOTA[allocations.ALLOCATE_CHOSEN],
        f"1, 0, {_REQUESTS}, {_TERMS}, ARRAY['1'], {_QUOTA}",
    ),
    "look": (
        waiting.LOOK,
        "1, ARRAY['ann'], ARRAY[NULL::text], ARRAY['new'], ARRAY['key'], ARRAY['lab-', ''], ARRAY['lab.', ''], 1",
    ),
    "load": (waiting.LOAD, "1"),
    "coming": (waiting.COMING, "1"),
    "leave": (waiting.LEAVE, "1, ARRAY['holder'], 'left'"),
    "end overdue": (waiting.END_OVERDUE, "1, interval '1 minute', ARRAY['student']"),
    "end play": (leases.END_PLAYS, "1, ARRAY[0], ARRAY['holder'], ARRAY[0], ARRAY['request'], ARRAY[NULL::text]"),
    "ended lease": (leases.HOLDERS_WITH_ENDED_LEASE, "1, ARRAY['holder']"),
    "claim": (lease_changes.CLAIM, "1, '1', 'holder', 'new holder', 14400, 'request', NULL, '\\x00', NULL"),
    "extend": (
        lease_changes.EXTEND,
        "1, '1', 'holder', '00000000-0000-0000-0000-000000000000', 60, NULL, 'request', 14400, NULL, '\\x00', NULL",
    ),
    "replace": (
        lease_changes.REPLACE,
        "1, '1', 'holder', 'reason', 'request', NULL, interval '1 day', 14400, 86400, 1, NULL, '\\x00', NULL",
    ),
}
_COMMON_LOOKUPS = {
    "allocator_epoch": "allocator_epoch_once: epoch",
    "active": "leases_one_per_holder: holder",
    "leased_sandbox": "sandboxes_pkey: sandbox_id",
    "keyed": "leases_one_per_idempotency_key: idempotency_key",
    "s": "sandboxes_pkey: sandbox_id",
}
_BY_PREFIX = {
    "first": "sandboxes_available_by_stem: available_stem",
    "next": "sandboxes_available_by_stem: available_stem",
    "of_stem": "sandboxes_available_by_stem: available_stem",
    "by_name": "sandboxes_available_by_name: available_name",
}
_LEASE_LOOKUPS = {
    "allocator_epoch": "allocator_epoch_once: epoch",
    "leased": "leases_one_per_sandbox: sandbox_id",
    "leased_sandbox": "sandboxes_pkey: sandbox_id",
}
_LOGIN_LOOKUPS = {
    "kept_login": "accesses_pkey: sandbox_id",
    "erased": "accesses_pkey: sandbox_id",
}
PLANS = {
    "any": {**_COMMON_LOOKUPS, "oldest": "sandboxes_available: available_since"},
    "by prefix": {
        **_COMMON_LOOKUPS,
        "first": "sandboxes_available_by_stem: available_stem",
        "next": "sandboxes_available_by_stem: available_stem",
        "of_stem": "sandboxes_available_by_stem: available_stem",
        "by_name": "sandboxes_available_by_name: available_name",
    },
    "chosen": {
        **_COMMON_LOOKUPS,
        "chosen_sandbox": "sandboxes_pkey: sandbox_id",
        "w": "waiting_one_per_holder: holder",
    },
    "look": {
        **_BY_PREFIX,
        "allocator_epoch": "allocator_epoch_once: epoch",
        "active": "leases_one_per_holder: holder",
        "keyed": "leases_one_per_idempotency_key: idempotency_key",
        "oldest_2": "sandboxes_available: available_since",  # PostgreSQL numbers equal aliases
        "w": "waiting_one_per_holder: holder",
        "counted": "waiting_one_per_holder",
    },
    "load": {"allocator_epoch": "allocator_epoch_once: epoch", "waiting": "waiting_pkey"},
    "coming": {
        "allocator_epoch": "allocator_epoch_once: epoch",
        "c": "creations_in_flight: name",
        "p": "stock_prefixes_pkey: name_prefix",
        "m": "creations_by_import: name_prefix",
    },
    "leave": {"allocator_epoch": "allocator_epoch_once: epoch", "w": "waiting_one_per_holder: holder"},
    "end overdue": {"allocator_epoch": "allocator_epoch_once: epoch", "w": "waiting_pkey: waiting_id"},
    "release": {
        "allocator_epoch": "allocator_epoch_once: epoch",
        "sandboxes": "sandboxes_pkey: sandbox_id",
        "leases": "leases_one_per_sandbox: sandbox_id",
        "l": "leases_pkey: lease_id",
        "s": "sandboxes_pkey: sandbox_id",
        **_LOGIN_LOOKUPS,
    },
    "end play": {
        "allocator_epoch": "allocator_epoch_once: epoch",
        "active": "leases_one_per_holder: holder",
        "l": "leases_pkey: lease_id",
        "s": "sandboxes_pkey: sandbox_id",
        **_LOGIN_LOOKUPS,
    },
    "ended lease": {
        "allocator_epoch": "allocator_epoch_once: epoch",
        "ended": "leases_by_holder: ''::text",
        "active": "leases_one_per_holder: holder",
        "claimed": "leases_by_first_holder: first_holder",
    },
    "claim": {
        **_LEASE_LOOKUPS,
        "active": "leases_one_per_holder: holder",
        "standby": "leases_pkey: lease_id",
    },
    "extend": {
        **_LEASE_LOOKUPS,
        "lease_extensions": "lease_extensions_pkey: extension_id",
        "current": "leases_pkey: lease_id",
    },
    "replace": {
        **_LEASE_LOOKUPS,
        "old": "sandboxes_pkey: sandbox_id",
        **_BY_PREFIX,
        "oldest": "sandboxes_available: available_since",
        "l_1": "leases_pkey: lease_id",  # the second use of the alias
        "s": "sandboxes_pkey: sandbox_id",
        "n": "sandboxes_pkey: sandbox_id",
        "w": "waiting_one_per_holder: holder",
        "by_replaced": "leases_by_replaced: replaces",
        "new_sandbox": "sandboxes_pkey: sandbox_id",
        "old_login": "accesses_pkey: sandbox_id",
        **_LOGIN_LOOKUPS,
    },
}

_QUOTA_LOOKUPS = {
    "active_of_policy": "leases_active_by_policy: policy",
    "of_term": "policies_pkey: name",
    "p": "policies_pkey: name",
    "active_of_token": "leases_active_by_token: token",
    "hour_of_token": "leases_by_token: token",
    "minute_of_token": "leases_by_token: token",
    "of_key": "tokens_pkey: key_id",
    "k": "tokens_pkey: key_id",
}
for _statement in ("any", "by prefix", "chosen"):
    PLANS[f"{_statement} with quota"] = {**PLANS[_statement], **_QUOTA_LOOKUPS}


async def _new(pool: Pool) -> None:
    pass


async def _emptied(pool: Pool) -> None:
    """Tables with the statistics of empty tables, as after the restore of an empty pool."""
    await pool.execute("VACUUM ANALYZE")


async def _full(pool: Pool) -> None:
    await pool.fill(1_000)
    await pool.execute("VACUUM ANALYZE")


async def _grown(pool: Pool) -> None:
    """Full tables with the statistics of empty ones."""
    await pool.execute("VACUUM ANALYZE")
    await pool.fill(1_000)


async def _leased(pool: Pool) -> None:
    for sandbox_id in await pool.fill(1_000, "allocated"):
        await pool.execute("INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ($1, $1, now())", sandbox_id)
    await pool.execute("VACUUM ANALYZE")


async def _large(pool: Pool) -> None:
    await pool.fill(50_000)
    await pool.execute("VACUUM ANALYZE")


async def _every_name_a_stem(pool: Pool) -> None:
    await pool.fill([f"lab-{number}-x" for number in range(5_000)])
    await pool.execute("VACUUM ANALYZE")


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("fill", [_new, _emptied, _full, _grown, _leased, _large, _every_name_a_stem])
async def test_a_generic_plan_uses_only_index_lookups(
    pool: Pool, fill: Callable[[Pool], Awaitable[None]], statement: str
) -> None:
    await fill(pool)
    sql, arguments = STATEMENTS[statement]
    connection = (await pool.write_session()).connection
    await connection.execute(f"PREPARE kept AS {sql}")
    plan = json.loads(await connection.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE kept ({arguments})"))
    assert dict(_access_paths(plan[0]["Plan"])) == PLANS[statement]


def _access_paths(node: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the alias and the access path (index and column) of each table in the plan."""
    if "Relation Name" in node and node["Node Type"] != "ModifyTable":
        path = node.get("Index Name", node["Node Type"])
        if condition := node.get("Index Cond"):
            first = condition.replace("ROW(", "").replace("(", "").split()[0].rstrip(",")
            path += ": " + first.rpartition(".")[2]
        yield node["Alias"], path
    for inner in node.get("Plans", ()):
        yield from _access_paths(inner)
