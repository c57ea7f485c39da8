"""Index of the ended leases with a student id to replace."""

from alembic import op

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None

ENDED = """
CREATE INDEX leases_with_student_id ON leases (ended_at)
WHERE ended_at IS NOT NULL AND (holder NOT LIKE 'forgotten-%' OR first_holder NOT LIKE 'forgotten-%')
"""


def upgrade() -> None:
    op.execute(ENDED)


def downgrade() -> None:
    op.execute("DROP INDEX leases_with_student_id")
