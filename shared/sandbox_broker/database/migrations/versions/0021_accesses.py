"""Logins inside sandboxes."""

from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("""
        CREATE TABLE accesses (
            sandbox_id text COLLATE "C" PRIMARY KEY,
            state text COLLATE "C" NOT NULL DEFAULT 'pending',
            groups jsonb NOT NULL,
            requested_at timestamptz NOT NULL DEFAULT now(),
            due_at timestamptz DEFAULT now(),
            claim uuid,
            first_claimed_at timestamptz,
            attempts integer NOT NULL DEFAULT 0,
            error text,
            email text,
            password text,
            password_key text COLLATE "C",
            user_id text,
            ready_at timestamptz,
            removal_wait interval,
            ended_at timestamptz,
            removed_at timestamptz,
            CONSTRAINT accesses_state
                CHECK (state IN ('pending', 'ready', 'failed', 'removing', 'removed', 'remains')),
            CONSTRAINT accesses_ended CHECK ((ended_at IS NULL) = (state IN ('pending', 'ready', 'failed'))),
            CONSTRAINT accesses_password_erased CHECK (ended_at IS NULL OR password IS NULL),
            CONSTRAINT accesses_ready CHECK (
                state <> 'ready' OR password IS NOT NULL AND user_id IS NOT NULL AND email IS NOT NULL
            ),
            CONSTRAINT accesses_password_key CHECK ((password IS NULL) = (password_key IS NULL))
        )
    """)
    op.execute("CREATE INDEX accesses_due ON accesses (due_at) WHERE due_at IS NOT NULL")
    op.execute("""
        CREATE INDEX accesses_by_state ON accesses (state) WHERE state IN ('failed', 'removing', 'remains')
    """)
    op.execute("CREATE INDEX accesses_by_key ON accesses (password_key) WHERE password IS NOT NULL")
    op.execute("COMMENT ON TABLE accesses IS 'logins inside sandboxes: one user per lease that asked for it'")
    for column, comment in {
        "groups": "names of the groups of the user",
        "due_at": "not to be claimed before: backoff, or claimed by a provisioner; null while there is no work",
        "claim": "the attempt that has it in hand",
        "first_claimed_at": "from then on a user may exist",
        "password": "encrypted with a key of ACCESS_KEYS",
        "password_key": "name of this key",
        "user_id": "id of the user in CSP",
        "removal_wait": "longest wait of the deletion of the sandbox for the removal",
        "ended_at": "end of the lease",
    }.items():
        op.execute(f"COMMENT ON COLUMN accesses.{column} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP TABLE accesses")
