"""Time at which an allocator last found that the database lacks the newest lease, for the status."""

from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

COMMENT = "last time that an allocator found the newest lease missing; null when the newest check found it"


def upgrade() -> None:
    op.execute("ALTER TABLE allocator_epoch ADD COLUMN database_behind_at timestamptz")
    op.execute(f"COMMENT ON COLUMN allocator_epoch.database_behind_at IS '{COMMENT}'")


def downgrade() -> None:
    op.execute("ALTER TABLE allocator_epoch DROP COLUMN database_behind_at")
