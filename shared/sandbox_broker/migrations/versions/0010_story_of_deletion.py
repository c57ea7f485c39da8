"""Which request has asked for a deletion: its story does not end where the deletion waits for its turn."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE sandboxes ADD COLUMN deletion_request_id text")
    op.execute(
        "COMMENT ON COLUMN sandboxes.deletion_request_id IS 'the request that asked for it; null where time was up'"
    )


def downgrade() -> None:
    op.execute("ALTER TABLE sandboxes DROP COLUMN deletion_request_id")
