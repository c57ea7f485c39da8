"""Creation intents, the state of the stock for each name prefix, and views of both."""

from alembic import op

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE creations (
    creation_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    name text COLLATE "C" NOT NULL,
    name_prefix text COLLATE "C" NOT NULL,
    state text NOT NULL DEFAULT 'pending',
    in_flight boolean NOT NULL DEFAULT true,
    granted_at timestamptz NOT NULL DEFAULT now(),
    due_at timestamptz NOT NULL DEFAULT now(),
    claim uuid,
    first_claimed_at timestamptz,
    attempts integer NOT NULL DEFAULT 0,
    error text,
    external_id text COLLATE "C",
    created_at timestamptz,
    imported_at timestamptz,
    ended_at timestamptz,
    request_id text,
    traceparent text,
    history jsonb NOT NULL DEFAULT '[]',
    CONSTRAINT creations_state CHECK (state IN ('pending', 'created', 'failed', 'abandoned')),
    CONSTRAINT creations_ended CHECK ((state = 'pending') = (ended_at IS NULL)),
    CONSTRAINT creations_imported CHECK (imported_at IS NULL OR state = 'created' AND NOT in_flight)
);
CREATE UNIQUE INDEX creations_one_per_name ON creations (name);
CREATE UNIQUE INDEX creations_one_per_account ON creations (external_id) WHERE external_id IS NOT NULL;
CREATE INDEX creations_in_flight ON creations (name) WHERE in_flight;
CREATE INDEX creations_by_import ON creations (name_prefix, imported_at) WHERE imported_at IS NOT NULL;
CREATE INDEX creations_by_prefix ON creations (name_prefix, creation_id);
CREATE TABLE stock_prefixes (
    name_prefix text COLLATE "C" PRIMARY KEY,
    next_number bigint NOT NULL,
    failures integer NOT NULL DEFAULT 0,
    last_error text,
    last_error_at timestamptz,
    stopped_at timestamptz,
    stop_cause text,
    stop_reason text,
    CONSTRAINT stock_prefixes_stop_cause CHECK (stop_cause IN ('refused', 'failures')),
    CONSTRAINT stock_prefixes_stopped CHECK ((stopped_at IS NULL) = (stop_cause IS NULL))
);
CREATE TABLE creation_duty (
    only_row integer PRIMARY KEY DEFAULT 1,
    run_id uuid,
    until timestamptz NOT NULL DEFAULT 'epoch',
    claimed_at timestamptz,
    CONSTRAINT creation_duty_only_row CHECK (only_row = 1)
);
INSERT INTO creation_duty DEFAULT VALUES
"""
STOCK_LEVELS = """
CREATE VIEW stock_levels AS
WITH levels AS MATERIALIZED (
    SELECT r.policy, r.name_prefix, r.prefix_end, r.min, r.max, r.admin_user,
        pool.available, pool.allocated, coming.creating, coming.begun, line.waiting,
        least(r.min + line.waiting, r.max) AS target
    FROM (
        SELECT *, (left(name_prefix, -1) || chr(ascii(right(name_prefix, 1)) + 1)) COLLATE "C" AS prefix_end
        FROM stock_rules
    ) r
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(number) FILTER (WHERE status = 'available'), 0)::bigint AS available,
            coalesce(sum(number) FILTER (WHERE status = 'allocated'), 0)::bigint AS allocated
        FROM (
            SELECT status, number FROM pool_counts
            WHERE kind = 'name_prefix' AND value >= r.name_prefix AND value < r.prefix_end
            UNION ALL
            SELECT status, number FROM pool_changes WHERE stem >= r.name_prefix AND stem < r.prefix_end
        ) counted
    ) pool
    CROSS JOIN LATERAL (
        SELECT count(*) AS creating, count(*) FILTER (WHERE first_claimed_at IS NOT NULL) AS begun
        FROM creations c WHERE c.in_flight AND c.name >= r.name_prefix AND c.name < r.prefix_end
    ) coming
    CROSS JOIN LATERAL (
        SELECT count(*) AS waiting FROM waiting w
        WHERE w.ends_at > now() AND starts_with(r.name_prefix, coalesce(w.name_prefix, ''))
    ) line
)
SELECT l.policy, l.name_prefix, l.prefix_end, l.min, l.max, l.admin_user, l.available, l.allocated, l.creating,
    l.begun, l.waiting, l.target,
    greatest(0, least(l.target - l.available - l.creating, room.places)) AS missing,
    greatest(0, l.available + l.creating - l.target, -room.places) AS surplus,
    p.next_number, coalesce(p.failures, 0) AS failures, p.last_error, p.last_error_at,
    p.stopped_at, p.stop_cause, p.stop_reason
FROM levels l
CROSS JOIN LATERAL (
    SELECT min(o.max - o.available - o.allocated - o.creating) AS places
    FROM levels o WHERE starts_with(l.name_prefix, o.name_prefix)
) room
LEFT JOIN stock_prefixes p ON p.name_prefix = l.name_prefix
"""
# A bounded number of leases, so that the cost has a bound under any load.
STOCK_FORECASTS = """
CREATE VIEW stock_forecasts AS
WITH recent AS MATERIALIZED (
    SELECT l.allocated_at, s.name
    FROM (
        SELECT sandbox_id, allocated_at FROM leases WHERE allocated_at > now() - interval '5 minutes'
        ORDER BY allocated_at DESC LIMIT 5000
    ) l
    CROSS JOIN LATERAL (SELECT name FROM sandboxes WHERE sandbox_id = l.sandbox_id LIMIT 1) s
),
usual AS MATERIALIZED (
    SELECT l.allocated_at, s.name
    FROM (
        SELECT sandbox_id, allocated_at FROM leases
        WHERE allocated_at > now() - interval '7 days' AND allocated_at <= now() - interval '167 hours'
        ORDER BY allocated_at LIMIT 5000
    ) l
    CROSS JOIN LATERAL (SELECT name FROM sandboxes WHERE sandbox_id = l.sandbox_id LIMIT 1) s
),
spans AS MATERIALIZED (
    SELECT
        (SELECT CASE WHEN count(*) < 5000 THEN 300
            ELSE greatest(1, extract(epoch FROM now() - min(allocated_at))) END
            FROM recent)::float AS recent_sec,
        (SELECT CASE WHEN count(*) < 5000 THEN 3600
            ELSE greatest(1, extract(epoch FROM max(allocated_at) - (now() - interval '7 days'))) END
            FROM usual)::float AS usual_sec
)
SELECT l.name_prefix, rates.recent_leases_per_sec, rates.usual_leases_per_sec,
    l.available / nullif(greatest(rates.recent_leases_per_sec, rates.usual_leases_per_sec), 0) AS exhaustion_sec,
    measured.creations, measured.creation_p50_sec, measured.creation_p90_sec
FROM stock_levels l
CROSS JOIN spans
CROSS JOIN LATERAL (
    SELECT
        (SELECT count(*) FROM recent r WHERE r.name >= l.name_prefix AND r.name < l.prefix_end)
            / spans.recent_sec AS recent_leases_per_sec,
        (SELECT count(*) FROM usual u WHERE u.name >= l.name_prefix AND u.name < l.prefix_end)
            / spans.usual_sec AS usual_leases_per_sec
) rates
CROSS JOIN LATERAL (
    SELECT count(*) AS creations,
        percentile_cont(0.5) WITHIN GROUP (ORDER BY sec) AS creation_p50_sec,
        percentile_cont(0.9) WITHIN GROUP (ORDER BY sec) AS creation_p90_sec
    FROM (
        SELECT extract(epoch FROM imported_at - first_claimed_at)::float AS sec FROM creations
        WHERE name_prefix = l.name_prefix AND imported_at IS NOT NULL
        ORDER BY imported_at DESC LIMIT 50
    ) last
) measured
"""
COMMENTS = {
    "TABLE creations": "creation intents: accounts to be created in CSP, each with a name of its own for ever",
    "COLUMN creations.in_flight": "counts for the max of its stock rule: no sync has imported its account, and the "
    "account may exist or may still be created",
    "COLUMN creations.due_at": "not to be claimed before: backoff, or claimed by a provisioner",
    "COLUMN creations.claim": "the run that has it in hand",
    "COLUMN creations.external_id": "the bare account UUID in CSP",
    "COLUMN creations.created_at": "when the account was first known to exist",
    "COLUMN creations.imported_at": "when a sync brought the account into the pool",
    "COLUMN creations.history": "grant, claims, failures and end, with times in Unix seconds; the newest 50",
    "TABLE stock_prefixes": "numbering, failures and stop of each name prefix that has or had a stock rule",
    "COLUMN stock_prefixes.next_number": "number of the next name; each grant raises it, so that of two concurrent "
    "grants the second grants nothing",
    "COLUMN stock_prefixes.failures": "consecutive failed attempts",
    "TABLE creation_duty": "which run may create accounts, and until when without asking again",
    "COLUMN creation_duty.claimed_at": "when a provisioner last asked",
    "VIEW stock_levels": "sandboxes and creation intents of each stock rule, and the number of missing ones",
    "VIEW stock_forecasts": "rate of new leases and measured creation times of each stock rule",
}


def upgrade() -> None:
    for statement in (*TABLES.split(";\n"), STOCK_LEVELS, STOCK_FORECASTS):
        op.execute(statement)
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP VIEW stock_forecasts, stock_levels")
    op.execute("DROP TABLE creations, stock_prefixes, creation_duty")
