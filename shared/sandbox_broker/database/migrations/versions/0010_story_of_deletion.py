"""Which request has asked for a deletion, and its trace: neither ends where the deletion waits for its turn."""

from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

COMMENTS = {
    "deletion_request_id": "the request that asked for it; null where time was up",
    "deletion_traceparent": "the W3C trace context of that request, if it is traced",
}


def upgrade() -> None:
    for column, comment in COMMENTS.items():
        op.execute(f"ALTER TABLE sandboxes ADD COLUMN {column} text")
        op.execute(f"COMMENT ON COLUMN sandboxes.{column} IS '{comment}'")


def downgrade() -> None:
    for column in COMMENTS:
        op.execute(f"ALTER TABLE sandboxes DROP COLUMN {column}")
