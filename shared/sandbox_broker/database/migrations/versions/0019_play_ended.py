"""End reason of a lease whose play Instruqt has ended."""

from alembic import op

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

REPLACE_REASONS = """
ALTER TABLE leases DROP CONSTRAINT leases_end_reason,
    ADD CONSTRAINT leases_end_reason CHECK (end_reason IN ({reasons}))
"""


def upgrade() -> None:
    op.execute(REPLACE_REASONS.format(reasons="'student', 'expired', 'unclaimed', 'broken', 'play_ended', 'admin'"))


def downgrade() -> None:
    op.execute("UPDATE leases SET end_reason = 'admin', end_note = 'play ended' WHERE end_reason = 'play_ended'")
    op.execute(REPLACE_REASONS.format(reasons="'student', 'expired', 'unclaimed', 'broken', 'admin'"))
