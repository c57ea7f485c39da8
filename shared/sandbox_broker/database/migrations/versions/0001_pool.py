"""The pool: sandboxes, leases, outbox, CSP mirror, allocator epoch."""

from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


SCHEMA = """
CREATE TABLE sandboxes (
    sandbox_id text PRIMARY KEY,
    external_id text NOT NULL,
    name text COLLATE "C" NOT NULL,
    sfdc_account_id text,
    status text NOT NULL,
    status_since timestamptz NOT NULL DEFAULT now(),
    missing_since timestamptz,
    deletion_requested_at timestamptz,
    deletion_reason text,
    deletion_due_at timestamptz,
    deletion_attempts integer NOT NULL DEFAULT 0,
    deletion_error text,
    CONSTRAINT sandboxes_status CHECK (
        status IN ('available', 'allocated', 'pending_deletion', 'deletion_failed', 'stale', 'deleted')
    )
) WITH (
    fillfactor = 75,
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_analyze_scale_factor = 0,
    autovacuum_analyze_threshold = 5000
);
COMMENT ON COLUMN sandboxes.sandbox_id IS 'CSP''s csp_id';
COMMENT ON COLUMN sandboxes.external_id IS 'the bare account UUID in CSP';
COMMENT ON COLUMN sandboxes.missing_since IS 'a student holds it, but CSP no longer lists it';
COMMENT ON COLUMN sandboxes.deletion_due_at IS
    'not to be tried before: backoff, or claimed by a reaper';

CREATE UNIQUE INDEX sandboxes_one_per_account ON sandboxes (external_id) WHERE status <> 'deleted';
CREATE INDEX sandboxes_available ON sandboxes (status_since, sandbox_id) WHERE status = 'available';
CREATE INDEX sandboxes_available_by_name ON sandboxes (name) WHERE status = 'available';
CREATE INDEX sandboxes_deletion_due ON sandboxes (deletion_due_at) WHERE status = 'pending_deletion';

CREATE TABLE leases (
    lease_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sandbox_id text NOT NULL,
    holder text NOT NULL,
    track_name text,
    idempotency_key text,
    allocated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    ended_at timestamptz,
    end_reason text,
    CONSTRAINT leases_end_reason CHECK (end_reason IN ('student', 'expired', 'admin')),
    CONSTRAINT leases_ended CHECK ((ended_at IS NULL) = (end_reason IS NULL))
);
CREATE UNIQUE INDEX leases_one_per_sandbox ON leases (sandbox_id);
CREATE UNIQUE INDEX leases_one_per_holder ON leases (holder) WHERE ended_at IS NULL;
CREATE UNIQUE INDEX leases_one_per_idempotency_key ON leases (idempotency_key)
    WHERE idempotency_key IS NOT NULL;
CREATE INDEX leases_by_expiry ON leases (expires_at) WHERE ended_at IS NULL;

CREATE TABLE outbox (
    outbox_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    event_id uuid NOT NULL DEFAULT gen_random_uuid(),
    type text NOT NULL,
    subject text,
    occurred_at timestamptz NOT NULL DEFAULT now(),
    data jsonb NOT NULL
) WITH (
    autovacuum_vacuum_scale_factor = 0,
    autovacuum_vacuum_threshold = 5000
);

CREATE TABLE csp_listings (
    listing_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    begun_at timestamptz NOT NULL DEFAULT now(),
    applied_at timestamptz
);

CREATE TABLE csp_accounts (
    external_id text PRIMARY KEY,
    sandbox_id text NOT NULL,
    name text COLLATE "C" NOT NULL,
    sfdc_account_id text,
    created_at timestamptz,
    listing_id bigint NOT NULL
);
COMMENT ON TABLE csp_accounts IS
    'what CSP last listed; a listing is staged here until it is complete';
CREATE INDEX csp_accounts_by_listing ON csp_accounts (listing_id);

CREATE TABLE allocator_epoch (
    only_row integer PRIMARY KEY DEFAULT 1,
    epoch bigint NOT NULL DEFAULT 0,
    backend_pid integer,
    CONSTRAINT allocator_epoch_only_row CHECK (only_row = 1)
);
INSERT INTO allocator_epoch DEFAULT VALUES;
"""


def upgrade() -> None:
    # asyncpg prepares every statement, and prepares one at a time.
    for statement in SCHEMA.strip().split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    op.execute("DROP TABLE allocator_epoch, csp_accounts, csp_listings, outbox, leases, sandboxes")
