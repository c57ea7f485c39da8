"""Allocation: one statement per group of requests, with or without quotas, for the longest available sandboxes or
for chosen ones.

Students wait for these statements, so each is planned once (`write_session.GENERIC_PLANS`), for the empty table of
a new installation as well as for a million sandboxes. The statements leave the planner one choice, whatever the
statistics say:

- They look rows up by `LIMIT 1` or `= ANY (ARRAY[key])` instead of joining tables.
- The condition of each partial index appears only in the look-up for this index.
- Other conditions have a form without a matching index (`status || ''`, `num_nulls`).
"""

import hmac
import json
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Literal, TypedDict

from allocator.policy_book import PolicyBook, Terms
from allocator.token_book import Token, TokenOutcome
from allocator.write_session import GUARD, ConcurrentUpdate, PoliciesChanged, WriteSession
from sandbox_broker.contract.commands import AllocateSandbox
from sandbox_broker.contract.types import LeaseMode
from sandbox_broker.database.schema import prefix_end

NOTHING = ", ".join(["NULL"] * 10)
"""Columns of an outcome without a lease."""

# Parameters: epoch, version of the policy book, one array per column of the requests, one array per column of the
# terms; by the index of the request the names of the tokens, the hashes of the lease secrets, and whether the token
# has limits. A request names its terms by their number, because the requests of a statement share few.
# Format fields: quota, admitted and refused are the parts for policies with max_active, below.
# requests: the requests, with the active lease of the holder and the lease of the idempotency key.
# demand: per prefix, the requests with neither. picked: a sandbox for each of them, longest available first.
# assigned: request and sandbox, or request and NULL. No CTE joins two sets: the arrays of one prefix are unnested
# side by side, so the cost grows with the number of requests for every plan.
_ALLOCATE = f"""
WITH {GUARD},
{{before}}
requests AS MATERIALIZED (
    SELECT r.*, current.*, keyed.holder = r.holder AS key_is_own
    FROM guard
    CROSS JOIN unnest($3::int[], $4::text[], $5::text[], $6::text[], $7::text[], $8::text[], $9::int[], $10::text[])
        AS r (index, holder, track_name, prefix, prefix_end, idempotency_key, term, mode)
    LEFT JOIN LATERAL (
        SELECT sandbox.*, active.allocated_at, active.expires_at, active.mode AS current_mode, active.claimed_at,
            active.token, active.secret_hash
        FROM leases active CROSS JOIN LATERAL (
            SELECT sandbox_id, name, external_id, sfdc_account_id FROM sandboxes leased_sandbox
            WHERE leased_sandbox.sandbox_id = active.sandbox_id LIMIT 1
        ) sandbox
        WHERE active.holder = r.holder AND active.ended_at IS NULL
        LIMIT 1
    ) current ON true
    LEFT JOIN LATERAL (
        SELECT keyed.holder FROM leases keyed
        WHERE keyed.idempotency_key = r.idempotency_key AND keyed.idempotency_key IS NOT NULL
        LIMIT 1
    ) keyed ON true
    WHERE guard.policy_version = $2
),
{{quota}}
demand AS MATERIALIZED (
    SELECT prefix, prefix_end, count(*) AS number, array_agg(index) AS indexes, array_agg(holder) AS holders,
        array_agg(track_name) AS track_names, array_agg(idempotency_key) AS idempotency_keys,
        array_agg(term) AS terms, array_agg(mode) AS modes
    FROM {{admitted}}
    GROUP BY prefix, prefix_end
),
picked AS MATERIALIZED (
    SELECT d.*, ARRAY({{picks}}) AS sandbox_ids FROM demand d
),
assigned AS MATERIALIZED (
    SELECT a.*, p.prefix
    FROM picked p
    CROSS JOIN unnest(p.indexes, p.holders, p.track_names, p.idempotency_keys, p.terms, p.modes, p.sandbox_ids)
        AS a (index, holder, track_name, idempotency_key, term, mode, sandbox_id)
),
claimed AS (
    UPDATE sandboxes s SET status = 'allocated', status_since = now(), track_name = a.track_name
    FROM assigned a
    WHERE s.sandbox_id = ANY (ARRAY[a.sandbox_id]) AND s.status || '' = 'available'
    RETURNING a.index, a.holder, a.track_name, a.idempotency_key, a.prefix, a.mode, a.term,
        now() + CASE WHEN a.mode = 'standby' THEN ($14::int[])[a.term] ELSE ($12::int[])[a.term] END
            * interval '1 second' AS expires_at,
        s.sandbox_id, s.name, s.external_id, s.sfdc_account_id
),
leased AS (
    INSERT INTO leases (
        sandbox_id, holder, track_name, idempotency_key, name_prefix, mode, expires_at,
        policy, lease_sec, max_extension_sec, standby_sec, max_replacements, token, secret_hash,
        token_has_quota
    )
    SELECT sandbox_id, holder, track_name, idempotency_key, nullif(prefix, ''), mode, expires_at,
        ($11::text[])[term], ($12::int[])[term], ($13::int[])[term], ($14::int[])[term], ($15::int[])[term],
        ($16::text[])[index + 1], ($17::bytea[])[index + 1], ($18::boolean[])[index + 1]
    FROM claimed
),
access_requested AS (
    INSERT INTO accesses (sandbox_id, groups)
    SELECT sandbox_id, ($19::text[])[term]::jsonb FROM claimed WHERE ($19::text[])[term] IS NOT NULL
),
{{after}}
announced AS (
    INSERT INTO outbox (type, subject, data)
    SELECT 'sandbox.allocated', c.sandbox_id, jsonb_build_object(
        'sandbox_id', c.sandbox_id, 'external_id', c.external_id, 'name', c.name, 'holder', c.holder,
        'track_name', c.track_name, 'policy', ($11::text[])[c.term],
        'expires_at', floor(extract(epoch FROM c.expires_at))::bigint, 'mode', c.mode
    )
    FROM claimed c
    UNION ALL
    SELECT 'pool.exhausted', NULL, jsonb_build_object('name_prefix', nullif(prefix, ''))
    FROM picked WHERE cardinality(array_remove(sandbox_ids, NULL)) < number
),
outcomes AS (
    SELECT index, 'new' AS outcome, sandbox_id, name, external_id, sfdc_account_id,
        now() AS allocated_at, expires_at, mode, NULL::timestamptz AS claimed_at,
        NULL::text AS token, NULL::bytea AS secret_hash
    FROM claimed
    UNION ALL
    SELECT index,
        CASE
            WHEN NOT key_is_own THEN 'key_of_another'
            WHEN sandbox_id IS NOT NULL THEN 'known'
            ELSE 'key_used_up'
        END,
        sandbox_id, name, external_id, sfdc_account_id, allocated_at, expires_at, current_mode, claimed_at,
        token, secret_hash
    FROM requests WHERE sandbox_id IS NOT NULL OR key_is_own IS NOT NULL
    UNION ALL
    SELECT index, 'exhausted', {NOTHING} FROM assigned WHERE sandbox_id IS NULL
    {{refused}}
    UNION ALL
    SELECT -1, 'policies_changed', {NOTHING}
    FROM guard WHERE policy_version <> $2
)
SELECT index, outcome, sandbox_id, name, external_id, sfdc_account_id, mode,
    floor(extract(epoch FROM allocated_at))::bigint AS allocated_at,
    floor(extract(epoch FROM expires_at))::bigint AS expires_at,
    floor(extract(epoch FROM claimed_at))::bigint AS claimed_at, token, secret_hash
FROM outcomes
"""

PICK_ANY = """
SELECT sandbox_id FROM sandboxes oldest WHERE available_since IS NOT NULL
ORDER BY available_since, sandbox_id LIMIT d.number FOR UPDATE SKIP LOCKED
"""

# Most names are a stem and a number, and few stems start with the prefix. The recursive CTE steps along the index
# from stem to stem; the sandboxes of each stem are indexed by age. A prefix with a digit at the end may split a
# number, so its names are selected by range and sorted.
PICK_BY_PREFIX = """
SELECT sandbox_id FROM (
    SELECT oldest.*
    FROM (
        WITH RECURSIVE stem AS (
            (
                SELECT available_stem FROM sandboxes first
                WHERE d.prefix !~ '[0-9]$' AND available_stem >= d.prefix AND available_stem < d.prefix_end
                ORDER BY available_stem LIMIT 1
            )
            UNION ALL
            SELECT next_stem.available_stem
            FROM stem CROSS JOIN LATERAL (
                SELECT available_stem FROM sandboxes next
                WHERE available_stem > stem.available_stem AND available_stem < d.prefix_end
                ORDER BY available_stem LIMIT 1
            ) next_stem
        )
        SELECT available_stem FROM stem
    ) stems
    CROSS JOIN LATERAL (
        SELECT sandbox_id, status_since FROM sandboxes of_stem
        WHERE available_stem = stems.available_stem
        ORDER BY status_since, sandbox_id LIMIT d.number FOR UPDATE SKIP LOCKED
    ) oldest
    UNION ALL
    SELECT oldest.*
    FROM (SELECT WHERE d.prefix ~ '[0-9]$') ends_with_a_digit
    CROSS JOIN LATERAL (
        SELECT sandbox_id, status_since FROM sandboxes by_name
        WHERE available_name >= d.prefix AND available_name < d.prefix_end
        ORDER BY status_since, sandbox_id LIMIT d.number FOR UPDATE SKIP LOCKED
    ) oldest
) candidates
ORDER BY status_since, sandbox_id LIMIT d.number
"""

PLACE_DATA = """
'place', waiting_id, 'holder', holder, 'name_prefix', name_prefix, 'track_name', track_name,
    'waiting_since', floor(extract(epoch FROM waiting_since))::bigint
"""
"""Fields of every event about a place in the waiting line."""

ANNOUNCE_SERVED = f"""
announced_served AS (
    INSERT INTO outbox (type, data)
    SELECT 'waiting.served', jsonb_build_object({PLACE_DATA}, 'sandbox_id', sandbox_id, 'name', name,
        'waited_sec', floor(extract(epoch FROM now() - waiting_since))::bigint)
    FROM served
)
"""
"""CTE that announces the places in the CTE `served`."""

# $20 has a sandbox for each request, or NULL. chosen: whether all of them are available. Otherwise
# the statement leases none, because a student would overtake one with a sandbox that is gone.
_CHOSEN = {
    "before": """
chosen AS MATERIALIZED (
    SELECT count(*) = cardinality(array_remove($20::text[], NULL)) AS are_available
    FROM (
        SELECT FROM sandboxes chosen_sandbox WHERE sandbox_id = ANY ($20::text[]) AND status || '' = 'available'
        FOR UPDATE SKIP LOCKED
    ) locked
),
""",
    "picks": """
SELECT CASE WHEN chosen.are_available THEN ($20::text[])[asked.index + 1] END
FROM chosen CROSS JOIN unnest(d.indexes) WITH ORDINALITY AS asked (index, number) ORDER BY asked.number
""",
    "after": f"""
served AS (
    DELETE FROM waiting w USING claimed c WHERE w.holder = ANY (ARRAY[c.holder COLLATE "C"])
    RETURNING w.*, c.sandbox_id, c.name
),
{ANNOUNCE_SERVED},
""",
}

_WITHOUT_QUOTA = {
    "quota": "",
    "admitted": "requests WHERE sandbox_id IS NULL AND key_is_own IS NULL",
    "refused": "",
}

# quota: the free leases of each policy with max_active. The end of a lease only raises this number meanwhile.
# token_quota: the free leases of each token with a limit. A request must fit both. The comparison of rows keeps the
# planner from leases_by_time, and num_nonnulls(token) keeps leases_by_token apart from leases_active_by_token.
# turn: policies under which this statement may grant leases. Of two concurrent statements the second finds another
# quota_grants, gets no turn and must run again, because it has not counted the leases of the first. token_turn: the
# same for tokens. A request that no policy admits takes no place of its token.
_WITH_QUOTA = {
    "quota": """
quota AS MATERIALIZED (
    SELECT t.term, t.policy, p.quota_grants, t.max_active - (
        SELECT count(*) FROM (
            SELECT FROM leases active_of_policy
            WHERE policy = t.policy AND policy IS NOT NULL AND num_nonnulls(ended_at) = 0
            LIMIT t.max_active
        ) counted
    ) AS free
    FROM unnest($11::text[], $max_active::int[]) WITH ORDINALITY AS t (policy, max_active, term)
    CROSS JOIN LATERAL (SELECT quota_grants FROM policies of_term WHERE of_term.name = t.policy LIMIT 1) p
    WHERE t.max_active IS NOT NULL
),
token_quota AS MATERIALIZED (
    SELECT t.key_id, t.name, k.quota_grants,
        t.max_active - (
            SELECT count(*) FROM (
                SELECT FROM leases active_of_token
                WHERE token = t.name AND token_has_quota AND token IS NOT NULL AND num_nonnulls(ended_at) = 0
                LIMIT t.max_active
            ) counted
        ) AS free,
        t.max_new_per_hour - (
            SELECT count(*) FROM (
                SELECT FROM leases hour_of_token
                WHERE token = t.name AND token_has_quota AND num_nonnulls(token) = 1
                  AND (token, allocated_at) > (t.name, now() - interval '1 hour')
                LIMIT t.max_new_per_hour
            ) counted
        ) AS free_of_hour,
        t.max_rate - (
            SELECT count(*) FROM (
                SELECT FROM leases minute_of_token
                WHERE token = t.name AND token_has_quota AND num_nonnulls(token) = 1
                  AND (token, allocated_at) > (t.name, now() - interval '1 minute')
                LIMIT t.max_rate
            ) counted
        ) AS free_of_minute
    FROM unnest($token_keys::text[], $token_names::text[], $token_limits::int[], $hour_limits::int[],
            $minute_limits::int[]) AS t (key_id, name, max_active, max_new_per_hour, max_rate)
    CROSS JOIN LATERAL (SELECT quota_grants FROM tokens of_key WHERE of_key.key_id = t.key_id LIMIT 1) k
),
wanted AS MATERIALIZED (
    SELECT *, row_number() OVER (PARTITION BY term ORDER BY index) AS place
    FROM requests WHERE sandbox_id IS NULL AND key_is_own IS NULL
),
turn AS (
    UPDATE policies p SET quota_grants = p.quota_grants + 1
    FROM quota q
    WHERE p.name = ANY (ARRAY[q.policy]) AND p.quota_grants = q.quota_grants
      AND q.free > 0 AND EXISTS (SELECT FROM wanted WHERE wanted.term = q.term)
    RETURNING q.term
),
judged_by_policy AS MATERIALIZED (
    SELECT wanted.*, ($16::text[])[wanted.index + 1] AS token_name, CASE
        WHEN q.term IS NULL THEN 'admitted'
        WHEN wanted.place > q.free THEN 'quota_exceeded'
        WHEN turn.term IS NULL THEN 'quota_raced'
        ELSE 'admitted'
    END AS verdict_of_policy
    FROM wanted LEFT JOIN quota q ON q.term = wanted.term LEFT JOIN turn ON turn.term = wanted.term
),
token_turn AS (
    UPDATE tokens k SET quota_grants = k.quota_grants + 1
    FROM token_quota q
    WHERE k.key_id = ANY (ARRAY[q.key_id]) AND k.quota_grants = q.quota_grants
      AND least(q.free, q.free_of_hour, q.free_of_minute) > 0
      AND EXISTS (
          SELECT FROM judged_by_policy j WHERE j.token_name = q.name AND j.verdict_of_policy = 'admitted'
      )
    RETURNING q.name
),
judged AS MATERIALIZED (
    SELECT j.*, CASE
        WHEN j.verdict_of_policy <> 'admitted' THEN j.verdict_of_policy
        WHEN q.name IS NULL THEN 'admitted'
        WHEN j.token_place > q.free THEN 'max_active'
        WHEN j.token_place > q.free_of_hour THEN 'max_new_per_hour'
        WHEN j.token_place > q.free_of_minute THEN 'max_rate'
        WHEN token_turn.name IS NULL THEN 'quota_raced'
        ELSE 'admitted'
    END AS verdict
    FROM (
        SELECT *, row_number() OVER (PARTITION BY token_name, verdict_of_policy ORDER BY index) AS token_place
        FROM judged_by_policy
    ) j
    LEFT JOIN token_quota q ON q.name = j.token_name
    LEFT JOIN token_turn ON token_turn.name = j.token_name
),
""",
    "admitted": "judged WHERE verdict = 'admitted'",
    "refused": f"""
    UNION ALL
    SELECT index, verdict, {NOTHING} FROM judged WHERE verdict <> 'admitted'
""",
}

_ANY = {"before": "", "picks": PICK_ANY, "after": ""}
_BY_PREFIX = {"before": "", "picks": PICK_BY_PREFIX, "after": ""}

ALLOCATE_ANY = _ALLOCATE.format(**_ANY, **_WITHOUT_QUOTA)
ALLOCATE_BY_PREFIX = _ALLOCATE.format(**_BY_PREFIX, **_WITHOUT_QUOTA)
ALLOCATE_CHOSEN = _ALLOCATE.format(**_CHOSEN, **_WITHOUT_QUOTA)


def _with_quota(parts: Mapping[str, str], first: int) -> str:
    """Return the statement with the parameters of the quotas from number `first` on: max_active of each of the
    terms, and one array per column of the tokens."""
    statement = _ALLOCATE.format(**parts, **_WITH_QUOTA)
    names = ("max_active", "token_keys", "token_names", "token_limits", "hour_limits", "minute_limits")
    for number, name in enumerate(names, first):
        statement = statement.replace(f"${name}", f"${number}")
    return statement


WITH_QUOTA: Mapping[str, str] = {
    ALLOCATE_ANY: _with_quota(_ANY, 20),
    ALLOCATE_BY_PREFIX: _with_quota(_BY_PREFIX, 20),
    ALLOCATE_CHOSEN: _with_quota(_CHOSEN, 21),
}
"""Statements for requests under a quota, by the statement without."""

CHECK_POLICY_VERSION = f"""
WITH {GUARD}
SELECT policy_version FROM guard
"""


class AllocationRow(TypedDict):
    index: int
    outcome: Literal[
        "new",
        "known",
        "key_of_another",
        "key_used_up",
        "exhausted",
        "quota_exceeded",
        "max_active",
        "max_new_per_hour",
        "max_rate",
        "quota_raced",
        "policies_changed",
        "token_ended",
        "out_of_scope",
        "wrong_secret",
    ]
    sandbox_id: str
    name: str
    external_id: str
    sfdc_account_id: str | None
    allocated_at: int
    expires_at: int
    mode: LeaseMode
    claimed_at: int | None
    token: str | None
    """Name of the token that the known lease was made with."""
    secret_hash: bytes | None
    """SHA-256 of the secret of the known lease."""


QUOTA_OUTCOMES = frozenset({"quota_exceeded", "max_active", "max_new_per_hour", "max_rate"})
"""Outcomes of requests under a quota. They can succeed later."""


async def allocate(session: WriteSession, commands: Sequence[AllocateSandbox]) -> list[AllocationRow]:
    """Return one row per command, in order. The commands must be free of conflicts (see
    domain.conflict_free_groups).

    Raises asyncpg.UniqueViolationError or ConcurrentUpdate if another allocator was faster; run it again.
    """
    has_prefix = any(command.name_prefix for command in commands)
    return await _allocate(session, ALLOCATE_BY_PREFIX if has_prefix else ALLOCATE_ANY, commands)


async def allocate_chosen(
    session: WriteSession, commands: Sequence[AllocateSandbox], sandbox_ids: Sequence[str | None]
) -> list[AllocationRow]:
    """Like `allocate`, with a chosen sandbox for each command, or None. The students leave the waiting line.

    No holder and no idempotency key occurs twice. If a chosen sandbox is not available any more, no sandbox is
    leased, and the outcome of each command with a chosen sandbox is `exhausted`.
    """
    return await _allocate(session, ALLOCATE_CHOSEN, commands, sandbox_ids)


async def _allocate(
    session: WriteSession, statement: str, commands: Sequence[AllocateSandbox], *more: object
) -> list[AllocationRow]:
    try:
        return await _try_to_allocate(session, statement, commands, *more)
    except PoliciesChanged:
        await session.policies.load(session.connection)
        return await _allocate(session, statement, commands, *more)


async def _try_to_allocate(
    session: WriteSession, statement: str, commands: Sequence[AllocateSandbox], *more: object
) -> list[AllocationRow]:
    """Raises PoliciesChanged if the policy book is outdated, and ConcurrentUpdate."""
    tokens = [session.policies.tokens.judge(command) for command in commands]
    if any(isinstance(token, str) for token in tokens):
        await check_policy_version(session)
    indexes = [index for index, token in enumerate(tokens) if not isinstance(token, str)]
    rows: list[AllocationRow] = []
    if indexes:
        rows = await _run_statement(session, statement, commands, indexes, tokens, *more)
    rows += [build_refusal(index, outcome) for index, outcome in enumerate(tokens) if isinstance(outcome, str)]
    return sorted(rows, key=itemgetter("index"))


async def check_policy_version(session: WriteSession) -> None:
    """Raises PoliciesChanged if the policy book is outdated."""
    row = await session.fetch_one(CHECK_POLICY_VERSION)
    if row["policy_version"] != session.policies.version:
        raise PoliciesChanged


async def _run_statement(
    session: WriteSession,
    statement: str,
    commands: Sequence[AllocateSandbox],
    indexes: Sequence[int],
    tokens: Sequence[Token | TokenOutcome | None],
    *more: object,
) -> list[AllocationRow]:
    """Run the statement for the commands with these indexes."""
    requests = [commands[index] for index in indexes]
    prefixes = [command.name_prefix or "" for command in requests]
    terms, term_numbers = number_terms(session.policies, requests)
    max_active = [term.max_active for term in terms]
    limited = {
        command.sender.key_id: token
        for command, token in zip(commands, tokens, strict=True)
        if command.sender is not None and isinstance(token, Token) and token.has_quota
    }
    has_quota = bool(limited) or any(limit is not None for limit in max_active)
    quotas: tuple[object, ...] = (
        max_active,
        list(limited),
        [token.name for token in limited.values()],
        [token.max_active for token in limited.values()],
        [token.max_new_per_hour for token in limited.values()],
        [token.max_rate for token in limited.values()],
    )
    rows: list[AllocationRow] = await session.fetch(
        WITH_QUOTA[statement] if has_quota else statement,
        session.policies.version,
        indexes,
        [command.holder for command in requests],
        [command.track_name for command in requests],
        prefixes,
        [prefix_end(prefix) if prefix else "" for prefix in prefixes],
        [command.idempotency_key for command in requests],
        term_numbers,
        [command.mode for command in requests],
        [term.policy for term in terms],
        [term.lease_sec for term in terms],
        [term.max_extension_sec for term in terms],
        [term.standby_sec for term in terms],
        [term.max_replacements for term in terms],
        [token.name if isinstance(token, Token) else None for token in tokens],
        [command.secret_hash and bytes.fromhex(command.secret_hash) for command in commands],
        [isinstance(token, Token) and token.has_quota for token in tokens],
        [None if term.access_groups is None else json.dumps(term.access_groups) for term in terms],
        *more,
        *(quotas if has_quota else ()),
    )
    if rows[0]["outcome"] == "policies_changed":
        raise PoliciesChanged
    if any(row["outcome"] == "quota_raced" for row in rows):
        raise ConcurrentUpdate
    return [_check_access(row, commands[row["index"]], tokens[row["index"]]) for row in rows]


def _check_access(
    row: AllocationRow, command: AllocateSandbox, token: Token | TokenOutcome | None
) -> AllocationRow:
    """Return the row, or one without the lease if the student has a lease that the sender may not see.

    The hashes of the secrets are compared in constant time.
    """
    if row["outcome"] != "known":
        return row
    if isinstance(token, Token) and token.is_scoped and row["token"] != token.name:
        return build_refusal(row["index"], "out_of_scope")
    known = row["secret_hash"]
    if known is not None and not hmac.compare_digest(known, bytes.fromhex(command.secret_hash or "")):
        return build_refusal(row["index"], "wrong_secret")
    return row


def build_refusal(index: int, outcome: TokenOutcome | Literal["wrong_secret"]) -> AllocationRow:
    """Return the row of a command that its sender may not send. It has no other field, and no caller reads one."""
    return {"index": index, "outcome": outcome}  # type: ignore[typeddict-item]  # the other fields are missing


def number_terms(policies: PolicyBook, commands: Sequence[AllocateSandbox]) -> tuple[list[Terms], list[int]]:
    """Return the distinct terms of the commands, and per command the number of its terms, counted from 1."""
    numbers: dict[Terms, int] = {}
    term_numbers = [numbers.setdefault(_find_terms(policies, command), len(numbers) + 1) for command in commands]
    return list(numbers), term_numbers


def _find_terms(policies: PolicyBook, command: AllocateSandbox) -> Terms:
    terms = policies.resolve(track_name=command.track_name, name_prefix=command.name_prefix)
    if command.access is not None and terms.access_groups is None:
        return terms._replace(access_groups=(command.access,))
    return terms
