"""Indexes of the outbox, with which the relay publishes the events of students before those of syncs."""

from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None

TYPES = "'{sandbox.discovered,sandbox.restored,sandbox.stale,sync.completed}'::text[]"
OF_STUDENTS = f"CREATE INDEX outbox_without_syncs ON outbox (outbox_id) WHERE type <> ALL ({TYPES})"
OF_SYNCS = f"CREATE INDEX outbox_of_syncs ON outbox (subject) WHERE type = ANY ({TYPES})"


def upgrade() -> None:
    # Like the ids of sandboxes in other tables. The order of a locale depends on the version of the C library.
    op.execute('ALTER TABLE outbox ALTER COLUMN subject TYPE text COLLATE "C"')
    op.execute(OF_STUDENTS)
    op.execute(OF_SYNCS)


def downgrade() -> None:
    op.execute("DROP INDEX outbox_without_syncs, outbox_of_syncs")
    op.execute('ALTER TABLE outbox ALTER COLUMN subject TYPE text COLLATE "default"')
