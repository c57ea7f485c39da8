"""Keys in byte order, because another version of the C library can change the order of a locale. A unique index in
that order would then miss rows and admit duplicates.

The tables are not rewritten; PostgreSQL builds their indexes again. Meanwhile no other statement runs.
"""

from collections.abc import Mapping, Sequence

from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

KEYS: Mapping[str, Sequence[str]] = {
    "allocator_epoch": ["queue"],
    "leases": ["sandbox_id", "holder", "track_name", "idempotency_key"],
    "sandboxes": ["sandbox_id", "external_id"],
    "history": ["sandbox_id"],
    "pool_counts": ["kind", "status"],
    "csp_accounts": ["sandbox_id", "external_id"],
}
"""In the order in which the allocator's statements lock the tables."""
POOL_TOTALS = """
CREATE VIEW pool_totals AS
SELECT status, sum(number)::bigint AS number
FROM (
    SELECT status, number FROM pool_counts WHERE kind = 'pool' UNION ALL SELECT status, number FROM pool_changes
) counted
GROUP BY status
"""
COMMENT = "COMMENT ON VIEW pool_totals IS 'number of sandboxes in each status, exact in every snapshot'"


def upgrade() -> None:
    _change_collation('"C"')


def downgrade() -> None:
    _change_collation('"default"')


def _change_collation(collation: str) -> None:
    op.execute(f"LOCK TABLE {', '.join(KEYS)} IN ACCESS EXCLUSIVE MODE")
    op.execute("DROP VIEW pool_totals")  # it uses columns of pool_counts
    for table, columns in KEYS.items():
        changes = ", ".join(f"ALTER COLUMN {column} TYPE text COLLATE {collation}" for column in columns)
        op.execute(f"ALTER TABLE {table} {changes}")
    op.execute(POOL_TOTALS)
    op.execute(COMMENT)
