"""Named tokens, the token and the secret of a lease, and the audit."""

from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    CREATE TABLE tokens (
        key_id text COLLATE "C" PRIMARY KEY,
        name text COLLATE "C" NOT NULL,
        role text NOT NULL,
        tracks text[] NOT NULL DEFAULT '{}',
        prefixes text[] NOT NULL DEFAULT '{}',
        max_active integer,
        max_new_per_hour integer,
        max_rate integer,
        expires_at timestamptz,
        token_hash bytea NOT NULL,
        pepper_id text,
        issued_at timestamptz NOT NULL DEFAULT now(),
        issued_by text,
        suspended_at timestamptz,
        revoked_at timestamptz,
        quota_grants bigint NOT NULL DEFAULT 0,
        CONSTRAINT tokens_role CHECK (role IN ('track', 'viewer', 'operator', 'admin'))
    )
    """,
    "CREATE UNIQUE INDEX tokens_one_per_name ON tokens (name) WHERE revoked_at IS NULL",
    """
    CREATE TABLE token_uses (
        key_id text COLLATE "C" PRIMARY KEY,
        last_used_at timestamptz NOT NULL
    )
    """,
    """
    CREATE TABLE audit (
        audit_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        at timestamptz NOT NULL DEFAULT now(),
        actor text COLLATE "C" NOT NULL,
        action text COLLATE "C" NOT NULL,
        object text COLLATE "C",
        reason text,
        request_id text,
        address text,
        outcome text NOT NULL
    )
    """,
    "CREATE INDEX audit_by_object ON audit (object, audit_id) WHERE object IS NOT NULL",
    "CREATE INDEX audit_by_actor ON audit (actor, audit_id)",
    "CREATE INDEX audit_by_time ON audit (at)",
    'ALTER TABLE leases ADD COLUMN token text COLLATE "C", ADD COLUMN secret_hash bytea',
    """
    CREATE INDEX leases_active_by_token ON leases (token)
        WHERE token IS NOT NULL AND num_nonnulls(ended_at) = 0
    """,
    "CREATE INDEX leases_by_token ON leases (token, allocated_at) WHERE num_nonnulls(token) = 1",
)
COMMENTS = {
    "TABLE tokens": "named tokens; revoked ones stay for the audit",
    "COLUMN tokens.key_id": "the part of the token that is no secret",
    "COLUMN tokens.tracks": "labs that the token may lease for; empty for all",
    "COLUMN tokens.prefixes": "name prefixes that the token may ask for; empty for all",
    "COLUMN tokens.max_active": "limit of active leases of the token",
    "COLUMN tokens.max_new_per_hour": "limit of new leases within any hour",
    "COLUMN tokens.max_rate": "limit of new leases within any minute",
    "COLUMN tokens.token_hash": "HMAC-SHA256 of the token with the pepper",
    "COLUMN tokens.pepper_id": "the pepper of the hash; null for none",
    "COLUMN tokens.quota_grants": "raised by each statement that grants leases under a limit, so that of two "
    "concurrent statements the second grants none",
    "TABLE token_uses": "last use of each token, in minutes",
    "TABLE audit": "commands of administrators and refusals for scope, in the transaction of their effect",
    "COLUMN audit.actor": "name of the token, or $ and the setting with the token",
    "COLUMN audit.outcome": "done, unchanged, or the code of the refusal",
    "COLUMN leases.token": "name of the token that it was made with; null for a token of a setting",
    "COLUMN leases.secret_hash": "SHA-256 of the lease secret; null if the client sent none",
    "TABLE policy_set": "the version of all policies and tokens",
    "COLUMN allocator_epoch.policy_version": "the policies and tokens that a statement of this queue must use",
}


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    op.execute("COMMENT ON TABLE policy_set IS 'the version of all policies'")
    op.execute(
        "COMMENT ON COLUMN allocator_epoch.policy_version IS 'the policies that a statement of this queue must use'"
    )
    op.execute("ALTER TABLE leases DROP COLUMN token, DROP COLUMN secret_hash")
    op.execute("DROP TABLE tokens, token_uses, audit")
