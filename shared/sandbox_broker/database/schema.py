"""Database schema, for queries and for comparison with the migrations. Only the allocator writes to it."""

from datetime import timedelta
from typing import Any

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Computed,
    DateTime,
    Double,
    Identity,
    Index,
    Integer,
    Interval,
    LargeBinary,
    MetaData,
    Sequence,
    Table,
    Text,
    Uuid,
    column,
    func,
    table,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

metadata = MetaData()

_Time = DateTime(timezone=True)
_Name = Text(collation="C")
"""Names in byte order, because a prefix search is a range of a btree index."""
_Key = Text(collation="C")
"""Keys in byte order. Another version of the C library may sort by other rules, so a unique index in the order of a
locale would admit duplicates after an upgrade of the machine."""


def prefix_end(prefix: str) -> str:
    """Return the exclusive upper bound, in code point order, of the names that start with `prefix`.

    An index finds names in [prefix, prefix_end). A prefix is printable ASCII, so its last character has a
    successor.
    """
    return prefix[:-1] + chr(ord(prefix[-1]) + 1)


PROOF_GRACE = timedelta(minutes=5)
"""CSP's listing may lag behind its deletions. A listing that was begun this long after a recorded deletion must not
contain the account any more."""


def _while_available(name: str, kind: Text | DateTime, value: str, comment: str | None = None) -> Column[Any]:
    """Return a generated column of available sandboxes. Each kind of search has its own column and index, so that
    the planner cannot choose the index of another search."""
    null = "NULL::timestamp with time zone" if kind is _Time else "NULL::text"
    # In the format of PostgreSQL, because alembic compares the text.
    expression = f"\nCASE\nWHEN status = 'available'::text THEN {value}\nELSE {null}\nEND"
    return Column(name, kind, Computed(expression, persisted=True), comment=comment)


sandboxes = Table(
    "sandboxes",
    metadata,
    Column("sandbox_id", _Key, primary_key=True, comment="CSP's csp_id"),
    Column("external_id", _Key, nullable=False, comment="the bare account UUID in CSP"),
    Column("name", _Name, nullable=False),
    Column("sfdc_account_id", Text),
    Column("status", Text, nullable=False),
    Column("status_since", _Time, nullable=False, server_default=func.now()),
    Column("missing_since", _Time, comment="a student holds it, but CSP no longer lists it"),
    Column("deletion_requested_at", _Time),
    Column("deletion_reason", Text),
    Column("deletion_due_at", _Time, comment="not to be tried before: backoff, or claimed by a reaper"),
    Column(
        "deletion_hold_until",
        _Time,
        comment="a broken sandbox is kept until then for an operator",
    ),
    Column("deletion_attempts", Integer, nullable=False, server_default=text("0")),
    Column("deletion_claim", Uuid, comment="the clean-up run that has it in hand, or had it last"),
    Column("deletion_request_id", Text, comment="the request that asked for it; null where time was up"),
    Column("deletion_traceparent", Text, comment="the W3C trace context of that request, if it is traced"),
    Column("deletion_error", Text),
    Column("deleted_at", _Time),
    Column("services_error", Text, comment="what went wrong with the services inside it, before its deletion"),
    Column("track_name", Text, comment="of the lease that it has or had"),
    _while_available("available_since", _Time, "status_since"),
    _while_available("available_name", _Name, "name", comment="the name, while it is available"),
    _while_available(
        "available_stem",
        _Name,
        "rtrim(name, '0123456789'::text)",
        comment="the name without its number, while it is available",
    ),
    CheckConstraint(
        "status IN ('available', 'allocated', 'pending_deletion', 'deletion_failed', 'stale', 'deleted')",
        name="sandboxes_status",
    ),
    # Unique, because two records of one account would allow two leases of it.
    Index(
        "sandboxes_one_per_account",
        "external_id",
        unique=True,
        postgresql_where=text("status <> 'deleted'"),
    ),
    Index(
        "sandboxes_available",
        "available_since",
        "sandbox_id",
        postgresql_where=text("available_since IS NOT NULL"),
    ),
    Index("sandboxes_available_by_name", "available_name", postgresql_where=text("available_name IS NOT NULL")),
    Index(
        "sandboxes_available_by_stem",
        "available_stem",
        "status_since",
        "sandbox_id",
        postgresql_where=text("available_stem IS NOT NULL"),
    ),
    Index("sandboxes_deletion_due", "deletion_due_at", postgresql_where=text("status = 'pending_deletion'")),
    Index(
        "sandboxes_by_status",
        "status",
        "status_since",
        "sandbox_id",
        postgresql_where=text("status IN ('pending_deletion', 'deletion_failed', 'stale', 'deleted')"),
    ),
    Index("sandboxes_on_hold", "deletion_hold_until", postgresql_where=text("deletion_hold_until IS NOT NULL")),
    Index("sandboxes_missing", "sandbox_id", postgresql_where=text("missing_since IS NOT NULL")),
    # For the administrator API. No statement of the allocator uses it.
    Index("sandboxes_by_name", "name", text("('' || sandbox_id)")),
)

leases = Table(
    "leases",
    metadata,
    Column("lease_id", BigInteger, Identity(always=True), primary_key=True),
    Column("sandbox_id", _Key, nullable=False),
    Column("holder", _Key, nullable=False),
    Column("track_name", _Key),
    Column("idempotency_key", _Key),
    Column("allocated_at", _Time, nullable=False, server_default=func.now()),
    Column("expires_at", _Time, nullable=False),
    Column("ended_at", _Time),
    Column("end_reason", Text),
    Column("end_note", Text, comment="what the administrator gave as a reason"),
    Column("policy", _Name, comment="name of the policy that granted it; null for the defaults"),
    Column("lease_sec", Integer, comment="granted lease time; null for a lease of an earlier version"),
    Column("max_extension_sec", Integer, comment="granted limit of all extensions together"),
    Column("standby_sec", Integer, comment="granted time until the claim of a standby lease"),
    Column("max_replacements", Integer, comment="granted replacements"),
    Column(
        "mode",
        Text,
        nullable=False,
        server_default=text("'active'"),
        comment="standby until the claim of a standby lease",
    ),
    Column("name_prefix", _Name, comment="prefix of the sandbox name that the student asked for"),
    Column("claimed_at", _Time, comment="claim of a standby lease, which starts its time"),
    Column(
        "first_holder", _Key, comment="student id under which it was taken, if the claim gave it to another one"
    ),
    Column(
        "extended_sec",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="all extensions by the student together",
    ),
    Column(
        "replacements",
        Integer,
        nullable=False,
        server_default=text("0"),
        comment="replaced sandboxes that the student had before",
    ),
    Column("replaces", _Key, comment="broken sandbox that this one replaces"),
    Column("token", _Key, comment="name of the token that it was made with; null for a token of a setting"),
    Column(
        "token_has_quota",
        Boolean,
        nullable=False,
        server_default=text("true"),
        comment="false: the token has no limits, so the indexes that count its leases omit this one",
    ),
    Column("secret_hash", LargeBinary, comment="SHA-256 of the lease secret; null if the client sent none"),
    CheckConstraint(
        "end_reason IN ('student', 'expired', 'unclaimed', 'broken', 'play_ended', 'admin')",
        name="leases_end_reason",
    ),
    CheckConstraint("(ended_at IS NULL) = (end_reason IS NULL)", name="leases_ended"),
    # A sandbox has at most one lease ever, because a used sandbox is never leased again.
    Index("leases_one_per_sandbox", "sandbox_id", unique=True),
    Index("leases_one_per_holder", "holder", unique=True, postgresql_where=text("ended_at IS NULL")),
    Index(
        "leases_one_per_idempotency_key",
        "idempotency_key",
        unique=True,
        postgresql_where=text("idempotency_key IS NOT NULL"),
    ),
    Index("leases_by_expiry", "expires_at", postgresql_where=text("end_reason IS NULL")),
    Index(
        "leases_active_by_policy",
        "policy",
        postgresql_where=text("policy IS NOT NULL AND num_nonnulls(ended_at) = 0"),
    ),
    Index(
        "leases_active_by_token",
        "token",
        postgresql_where=text("token_has_quota AND token IS NOT NULL AND num_nonnulls(ended_at) = 0"),
    ),
    Index(
        "leases_by_token",
        "token",
        "allocated_at",
        postgresql_where=text("token_has_quota AND num_nonnulls(token) = 1"),
    ),
    Index("leases_standby", "expires_at", postgresql_where=text("mode = 'standby' AND end_reason IS NULL")),
    Index("leases_by_first_holder", "first_holder", postgresql_where=text("first_holder IS NOT NULL")),
    Index(
        "leases_with_student_id",
        "ended_at",
        postgresql_where=text(
            "ended_at IS NOT NULL AND (holder NOT LIKE 'forgotten-%' OR first_holder NOT LIKE 'forgotten-%')"
        ),
    ),
    Index("leases_by_replaced", "replaces", postgresql_where=text("replaces IS NOT NULL")),
    # For the administrator API.
    Index("leases_by_time", "allocated_at", text("(0 + lease_id)")),
    Index("leases_by_holder", text("('' || holder)"), "allocated_at", text("(0 + lease_id)")),
    Index(
        "leases_by_track",
        "track_name",
        "allocated_at",
        text("(0 + lease_id)"),
        postgresql_where=text("track_name IS NOT NULL"),
    ),
)

policies = Table(
    "policies",
    metadata,
    Column("name", _Name, primary_key=True),
    Column("document", JSONB, nullable=False, comment="the fields that the administrator set"),
    Column(
        "quota_grants",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="raised by each statement that grants leases under max_active, so that of two concurrent "
        "statements the second grants none",
    ),
    comment="rules of labs, as an administrator applied them",
)

policy_set = Table(
    "policy_set",
    metadata,
    Column("only_row", Integer, primary_key=True, server_default=text("1")),
    Column("version", BigInteger, nullable=False, server_default=text("0")),
    Column("applied_at", _Time),
    CheckConstraint("only_row = 1", name="policy_set_only_row"),
    comment="the version of all policies and tokens",
)

tokens = Table(
    "tokens",
    metadata,
    Column("key_id", _Key, primary_key=True, comment="the part of the token that is no secret"),
    Column("name", _Key, nullable=False),
    Column("role", Text, nullable=False),
    Column(
        "tracks",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'"),
        comment="labs that the token may lease for; empty for all",
    ),
    Column(
        "prefixes",
        ARRAY(Text),
        nullable=False,
        server_default=text("'{}'"),
        comment="name prefixes that the token may ask for; empty for all",
    ),
    Column("max_active", Integer, comment="limit of active leases of the token"),
    Column("max_new_per_hour", Integer, comment="limit of new leases within any hour"),
    Column("max_rate", Integer, comment="limit of new leases within any minute"),
    Column("expires_at", _Time),
    Column("token_hash", LargeBinary, nullable=False, comment="HMAC-SHA256 of the token with the pepper"),
    Column("pepper_id", Text, comment="the pepper of the hash; null for none"),
    Column("issued_at", _Time, nullable=False, server_default=func.now()),
    Column("issued_by", Text),
    Column("suspended_at", _Time),
    Column("revoked_at", _Time),
    Column(
        "quota_grants",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="raised by each statement that grants leases under a limit, so that of two concurrent "
        "statements the second grants none",
    ),
    CheckConstraint("role IN ('track', 'viewer', 'operator', 'admin')", name="tokens_role"),
    Index("tokens_one_per_name", "name", unique=True, postgresql_where=text("revoked_at IS NULL")),
    comment="named tokens; revoked ones stay for the audit",
)

token_uses = Table(
    "token_uses",
    metadata,
    Column("key_id", _Key, primary_key=True),
    Column("last_used_at", _Time, nullable=False),
    comment="last use of each token, in minutes",
)

audit = Table(
    "audit",
    metadata,
    Column("audit_id", BigInteger, Identity(always=True), primary_key=True),
    Column("at", _Time, nullable=False, server_default=func.now()),
    Column("actor", _Key, nullable=False, comment="name of the token, or $ and the setting with the token"),
    Column("action", _Key, nullable=False),
    Column("object", _Key),
    Column("reason", Text),
    Column("request_id", Text),
    Column("address", Text),
    Column("outcome", Text, nullable=False, comment="done, unchanged, or the code of the refusal"),
    Index("audit_by_object", "object", "audit_id", postgresql_where=text("object IS NOT NULL")),
    Index("audit_by_actor", "actor", "audit_id"),
    Index("audit_by_time", "at"),
    comment="commands of administrators and refusals for scope, in the transaction of their effect",
)

waiting = Table(
    "waiting",
    metadata,
    Column("waiting_id", BigInteger, Identity(always=True), primary_key=True, comment="order of the line"),
    Column("holder", _Name, nullable=False),
    Column("name_prefix", _Name, comment="null if the student takes any sandbox"),
    Column("track_name", Text),
    Column("command", JSONB, nullable=False, comment="the request, carried out when a sandbox is there"),
    Column("waiting_since", _Time, nullable=False, server_default=func.now()),
    Column("asked_at", _Time, nullable=False, server_default=func.now(), comment="last repetition of the request"),
    Column("ends_at", _Time, nullable=False, comment="end of the longest wait"),
    Index("waiting_one_per_holder", "holder", unique=True),
    comment="the waiting line: students without a sandbox, first come, first served",
)

lease_extensions = Table(
    "lease_extensions",
    metadata,
    Column("extension_id", Uuid, primary_key=True),
    Column("lease_id", BigInteger, nullable=False),
    Column("extension_sec", Integer, nullable=False),
    Column("expires_at", _Time, nullable=False, comment="end of the lease after the extension"),
    Column("granted_at", _Time, nullable=False, server_default=func.now()),
    comment="granted extensions, so that each is granted once",
)

_SYNC_TYPES = "'{sandbox.discovered,sandbox.restored,sandbox.stale,sync.completed}'::text[]"
outbox = Table(
    "outbox",
    metadata,
    Column("outbox_id", BigInteger, Identity(always=True), primary_key=True),
    Column("event_id", Uuid, nullable=False, server_default=func.gen_random_uuid()),
    Column("type", Text, nullable=False),
    Column("subject", _Key),
    Column("occurred_at", _Time, nullable=False, server_default=func.now()),
    Column("data", JSONB, nullable=False),
    Index("outbox_without_syncs", "outbox_id", postgresql_where=text(f"type <> ALL ({_SYNC_TYPES})")),
    Index("outbox_of_syncs", "subject", postgresql_where=text(f"type = ANY ({_SYNC_TYPES})")),
)

history = Table(
    "history",
    metadata,
    Column("sandbox_id", _Key, primary_key=True),
    Column("outbox_id", BigInteger, primary_key=True, autoincrement=False),
    Column("type", Text, nullable=False),
    Column("occurred_at", _Time, nullable=False),
    Column("data", JSONB, nullable=False),
    Column("event_id", Uuid),
    Index("history_by_order", "outbox_id"),
    comment="the published events of each sandbox whose record is kept",
)

# Triggers on sandboxes insert every change into pool_changes, and the outbox relay adds the changes to pool_counts.
# Thus counting takes no row locks, and the sum of both tables is exact in every snapshot.
pool_changes = Table(
    "pool_changes",
    metadata,
    Column("status", Text, nullable=False),
    Column("stem", _Name, nullable=False),
    Column("track_name", Text),
    Column("number", BigInteger, nullable=False),
    comment="what pool_counts does not contain yet",
)

pool_counts = Table(
    "pool_counts",
    metadata,
    Column("kind", _Key, primary_key=True),
    Column("value", _Name, primary_key=True),
    Column("status", _Key, primary_key=True),
    Column("number", BigInteger, nullable=False),
    CheckConstraint("kind IN ('pool', 'name_prefix', 'track_name')", name="pool_counts_kind"),
    Index("pool_counts_zero", "kind", postgresql_where=text("number = 0")),
    comment="how many sandboxes there are; exact together with pool_changes",
)

pool_samples = Table(
    "pool_samples",
    metadata,
    Column("sampled_at", _Time, primary_key=True),
    Column("available", BigInteger, nullable=False),
    Column("allocated", BigInteger, nullable=False),
    Column("pending_deletion", BigInteger, nullable=False),
    Column("deletion_failed", BigInteger, nullable=False),
    Column("stale", BigInteger, nullable=False),
    Column("waiting", BigInteger, nullable=False),
)

cleanup_duty = Table(
    "cleanup_duty",
    metadata,
    Column("only_row", Integer, primary_key=True, server_default=text("1")),
    Column("run_id", Uuid),
    Column("until", _Time, nullable=False, server_default=text("'epoch'")),
    CheckConstraint("only_row = 1", name="cleanup_duty_only_row"),
    comment="which clean-up run may delete, and until when without asking again",
)

jobs = Table(
    "jobs",
    metadata,
    Column("job_id", Uuid, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("progress", JSONB, nullable=False, server_default=text("'{}'")),
    Column("result", JSONB),
    Column("started_at", _Time, nullable=False, server_default=func.now()),
    Column("updated_at", _Time, nullable=False, server_default=func.now()),
    CheckConstraint("kind IN ('sync', 'cleanup')", name="jobs_kind"),
    CheckConstraint("state IN ('running', 'completed', 'held', 'failed')", name="jobs_state"),
    comment="what an administrator has started, and how it goes",
)

dead_letters = Table(
    "dead_letters",
    metadata,
    Column("dead_letter_id", Uuid, primary_key=True),
    Column("died_at", _Time, nullable=False),
    Column("queue", Text, nullable=False, comment="that it died in"),
    Column("reason", Text, nullable=False),
    Column("commands", ARRAY(Text), nullable=False, comment="their types, as far as they can be read"),
    Column("message_id", Text),
    Column("correlation_id", Text),
    Column("content_type", Text),
    Column("body", LargeBinary, nullable=False),
    Index("dead_letters_by_time", "died_at", "dead_letter_id"),
    comment="messages that could not be processed, until a person replays or drops them",
)

csp_listings = Table(
    "csp_listings",
    metadata,
    Column("listing_id", BigInteger, Identity(always=True), primary_key=True),
    Column("begun_at", _Time, nullable=False, server_default=func.now()),
    Column("applied_at", _Time),
    Column("held_at", _Time),
    Column("outcome", JSONB, comment="what it has done, or, while it is held, would do"),
)

# Unlogged, because the next listing restores rows that a crash of the database loses.
csp_accounts = Table(
    "csp_accounts",
    metadata,
    Column("listing_id", BigInteger, primary_key=True),
    Column("sandbox_id", _Key, primary_key=True),
    Column("external_id", _Key, comment="null where the record could not be read further than its csp_id"),
    Column("name", _Name),
    Column("sfdc_account_id", Text),
    Column("created_at", _Time),
    Index("csp_accounts_once", "listing_id", "external_id", unique=True),
    prefixes=["UNLOGGED"],
    comment="what the last applied listing of CSP contains, and what is staged of the next",
)

_epochs = Sequence("allocator_epochs", metadata=metadata)

allocator_epoch = Table(
    "allocator_epoch",
    metadata,
    Column("queue", _Key, primary_key=True),
    Column("epoch", BigInteger, _epochs, nullable=False, server_default=_epochs.next_value()),
    Column("backend_pid", Integer),
    Column(
        "policy_version",
        BigInteger,
        nullable=False,
        server_default=text("0"),
        comment="the policies and tokens that a statement of this queue must use",
    ),
    Column(
        "database_behind_at",
        _Time,
        comment="last time that an allocator found the newest lease missing; null when the newest check found it",
    ),
    Index("allocator_epoch_once", "epoch", unique=True),
    comment="who may write: for each queue of the allocator the epoch of its newest consumer",
)

# Views. The migrations contain their definitions.
pool_totals = table("pool_totals", column("status", Text), column("number", BigInteger))
"""Number of sandboxes in each status, exact in every snapshot. A status without sandboxes may have no row."""
applied_listing = table(
    "applied_listing",
    column("listing_id", BigInteger),
    column("begun_at", _Time),
    column("applied_at", _Time),
    column("outcome", JSONB),
)
"""The last applied listing. No row before the first one."""
decided_listing = table(
    "decided_listing",
    column("listing_id", BigInteger),
    column("begun_at", _Time),
    column("applied_at", _Time),
    column("held_at", _Time),
    column("outcome", JSONB),
)
"""The newest listing that was applied or is held. No row before the first one."""
stock_rules = table(
    "stock_rules",
    column("policy", Text),
    column("name_prefix", _Name),
    column("min", Integer),
    column("max", Integer),
    column("admin_user", JSONB),
)
"""Stock rules of the policies."""

stock_levels = table(
    "stock_levels",
    column("policy", Text),
    column("name_prefix", _Name),
    column("prefix_end", _Name),
    column("min", Integer),
    column("max", Integer),
    column("admin_user", JSONB),
    column("available", BigInteger),
    column("allocated", BigInteger),
    column("creating", BigInteger),
    column("begun", BigInteger),
    column("waiting", BigInteger),
    column("target", BigInteger),
    column("missing", BigInteger),
    column("surplus", BigInteger),
    column("next_number", BigInteger),
    column("failures", Integer),
    column("last_error", Text),
    column("last_error_at", _Time),
    column("stopped_at", _Time),
    column("stop_cause", Text),
    column("stop_reason", Text),
)
"""Levels of each stock rule, exact in every snapshot. `creating` counts the intents in flight, `begun` those of
them that were claimed. `missing` is the number of intents to grant so that the rule reaches `target` and no rule
exceeds its `max`. `surplus` is the number of intents that are not needed any more."""
stock_forecasts = table(
    "stock_forecasts",
    column("name_prefix", _Name),
    column("recent_leases_per_sec", Double),
    column("usual_leases_per_sec", Double),
    column("exhaustion_sec", Double),
    column("creations", BigInteger),
    column("creation_p50_sec", Double),
    column("creation_p90_sec", Double),
)
"""Forecast of each stock rule. The rates are those of the last five minutes, and of the coming hour a week ago.
`exhaustion_sec` takes the higher one; None without leases. The creation times are those of the last 50 creations,
from the first claim to the import; None before the first one."""

VIEWS = (pool_totals, applied_listing, decided_listing, stock_rules, stock_levels, stock_forecasts)

allocators = Table(
    "allocators",
    metadata,
    Column("allocator_id", Uuid, primary_key=True),
    Column(
        "presence_queue",
        Text,
        nullable=False,
        comment="its exclusive queue, which exists only in the RabbitMQ of its broker",
    ),
    Column("reports", BigInteger, nullable=False, server_default=text("0")),
    Column("started_at", _Time, nullable=False, server_default=func.now()),
    Column("seen_at", _Time, nullable=False, server_default=func.now()),
    Column("other_broker_at", _Time, comment="last time it has seen an allocator of another broker"),
    comment="allocators that report about twice a second",
)

creations = Table(
    "creations",
    metadata,
    Column("creation_id", BigInteger, Identity(always=True), primary_key=True),
    Column("name", _Name, nullable=False),
    Column("name_prefix", _Name, nullable=False),
    Column("state", Text, nullable=False, server_default="pending"),
    Column(
        "in_flight",
        Boolean,
        nullable=False,
        server_default=text("true"),
        comment="counts for the max of its stock rule: no sync has imported its account, and the account may exist "
        "or may still be created",
    ),
    Column("granted_at", _Time, nullable=False, server_default=func.now()),
    Column(
        "due_at",
        _Time,
        nullable=False,
        server_default=func.now(),
        comment="not to be claimed before: backoff, or claimed by a provisioner",
    ),
    Column("claim", Uuid, comment="the run that has it in hand"),
    Column("first_claimed_at", _Time),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("error", Text),
    Column("external_id", _Key, comment="the bare account UUID in CSP"),
    Column("created_at", _Time, comment="when the account was first known to exist"),
    Column("imported_at", _Time, comment="when a sync brought the account into the pool"),
    Column("ended_at", _Time),
    Column("request_id", Text),
    Column("traceparent", Text),
    Column(
        "history",
        JSONB,
        nullable=False,
        server_default=text("'[]'"),
        comment="grant, claims, failures and end, with times in Unix seconds; the newest 50",
    ),
    CheckConstraint("state IN ('pending', 'created', 'failed', 'abandoned')", name="creations_state"),
    CheckConstraint("(state = 'pending') = (ended_at IS NULL)", name="creations_ended"),
    CheckConstraint("imported_at IS NULL OR state = 'created' AND NOT in_flight", name="creations_imported"),
    Index("creations_one_per_name", "name", unique=True),
    Index(
        "creations_one_per_account",
        "external_id",
        unique=True,
        postgresql_where=text("external_id IS NOT NULL"),
    ),
    Index("creations_in_flight", "name", postgresql_where=text("in_flight")),
    Index("creations_by_import", "name_prefix", "imported_at", postgresql_where=text("imported_at IS NOT NULL")),
    Index("creations_by_prefix", "name_prefix", "creation_id"),
    comment="creation intents: accounts to be created in CSP, each with a name of its own for ever",
)

stock_prefixes = Table(
    "stock_prefixes",
    metadata,
    Column("name_prefix", _Name, primary_key=True),
    Column(
        "next_number",
        BigInteger,
        nullable=False,
        comment="number of the next name; each grant raises it, so that of two concurrent grants the second grants "
        "nothing",
    ),
    Column("failures", Integer, nullable=False, server_default=text("0"), comment="consecutive failed attempts"),
    Column("last_error", Text),
    Column("last_error_at", _Time),
    Column("stopped_at", _Time),
    Column("stop_cause", Text),
    Column("stop_reason", Text),
    CheckConstraint("stop_cause IN ('refused', 'failures')", name="stock_prefixes_stop_cause"),
    CheckConstraint("(stopped_at IS NULL) = (stop_cause IS NULL)", name="stock_prefixes_stopped"),
    comment="numbering, failures and stop of each name prefix that has or had a stock rule",
)

creation_duty = Table(
    "creation_duty",
    metadata,
    Column("only_row", Integer, primary_key=True, server_default=text("1")),
    Column("run_id", Uuid),
    Column("until", _Time, nullable=False, server_default=text("'epoch'")),
    Column("claimed_at", _Time, comment="when a provisioner last asked"),
    CheckConstraint("only_row = 1", name="creation_duty_only_row"),
    comment="which run may create accounts, and until when without asking again",
)

accesses = Table(
    "accesses",
    metadata,
    Column("sandbox_id", _Key, primary_key=True),
    Column("state", _Key, nullable=False, server_default=text("'pending'")),
    Column("groups", JSONB, nullable=False, comment="names of the groups of the user"),
    Column("requested_at", _Time, nullable=False, server_default=func.now()),
    Column(
        "due_at",
        _Time,
        server_default=func.now(),
        comment="not to be claimed before: backoff, or claimed by a provisioner; null while there is no work",
    ),
    Column("claim", Uuid, comment="the attempt that has it in hand"),
    Column("first_claimed_at", _Time, comment="from then on a user may exist"),
    Column("attempts", Integer, nullable=False, server_default=text("0")),
    Column("error", Text),
    Column("email", Text),
    Column("password", Text, comment="encrypted with a key of ACCESS_KEYS"),
    Column("password_key", _Key, comment="name of this key"),
    Column("user_id", Text, comment="id of the user in CSP"),
    Column("ready_at", _Time),
    Column("removal_wait", Interval, comment="longest wait of the deletion of the sandbox for the removal"),
    Column("ended_at", _Time, comment="end of the lease"),
    Column("removed_at", _Time),
    CheckConstraint(
        "state IN ('pending', 'ready', 'failed', 'removing', 'removed', 'remains')", name="accesses_state"
    ),
    CheckConstraint("(ended_at IS NULL) = (state IN ('pending', 'ready', 'failed'))", name="accesses_ended"),
    CheckConstraint("ended_at IS NULL OR password IS NULL", name="accesses_password_erased"),
    CheckConstraint(
        "state <> 'ready' OR password IS NOT NULL AND user_id IS NOT NULL AND email IS NOT NULL",
        name="accesses_ready",
    ),
    CheckConstraint("(password IS NULL) = (password_key IS NULL)", name="accesses_password_key"),
    Index("accesses_due", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    Index("accesses_by_state", "state", postgresql_where=text("state IN ('failed', 'removing', 'remains')")),
    Index("accesses_by_key", "password_key", postgresql_where=text("password IS NOT NULL")),
    comment="logins inside sandboxes: one user per lease that asked for it",
)
