"""Indexes by token for leases of tokens with limits only.

A lease of another token is never counted. Its entries in two indexes, and those after its end, would cost the class
of a lab.
"""

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None

INDEX_BY_TIME = "CREATE INDEX leases_by_token ON leases (token, allocated_at) WHERE {} num_nonnulls(token) = 1"
INDEX_OF_ACTIVE = """
CREATE INDEX leases_active_by_token ON leases (token)
    WHERE {} token IS NOT NULL AND num_nonnulls(ended_at) = 0
"""
COMMENT = "false: the token has no limits, so the indexes that count its leases omit this one"


def upgrade() -> None:
    # True for existing leases, and for those of an earlier version of the allocator during a rolling upgrade.
    op.execute("ALTER TABLE leases ADD COLUMN token_has_quota boolean NOT NULL DEFAULT true")
    op.execute(f"COMMENT ON COLUMN leases.token_has_quota IS '{COMMENT}'")
    _build_indexes("token_has_quota AND")


def downgrade() -> None:
    _build_indexes("")
    op.execute("ALTER TABLE leases DROP COLUMN token_has_quota")


def _build_indexes(condition: str) -> None:
    op.execute("DROP INDEX leases_by_token, leases_active_by_token")
    op.execute(INDEX_BY_TIME.format(condition))
    op.execute(INDEX_OF_ACTIVE.format(condition))
