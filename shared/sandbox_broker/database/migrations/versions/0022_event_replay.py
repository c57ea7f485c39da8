"""Replay of events in their order, and samples of the pool over time."""

from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None

# Rows of earlier versions have no event id. They are not replayed.
EVENT_IDS = "ALTER TABLE history ADD COLUMN event_id uuid"
ORDER = "CREATE INDEX history_by_order ON history (outbox_id)"
SAMPLES = """
CREATE TABLE pool_samples (
    sampled_at timestamptz PRIMARY KEY,
    available bigint NOT NULL,
    allocated bigint NOT NULL,
    pending_deletion bigint NOT NULL,
    deletion_failed bigint NOT NULL,
    stale bigint NOT NULL,
    waiting bigint NOT NULL
)
"""


def upgrade() -> None:
    op.execute(EVENT_IDS)
    op.execute(ORDER)
    op.execute(SAMPLES)


def downgrade() -> None:
    op.execute("DROP TABLE pool_samples")
    op.execute("DROP INDEX history_by_order")
    op.execute("ALTER TABLE history DROP COLUMN event_id")
