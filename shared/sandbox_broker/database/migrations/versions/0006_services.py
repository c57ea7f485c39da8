"""What went wrong with the services inside a sandbox."""

from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute("ALTER TABLE sandboxes ADD COLUMN services_error text")
    op.execute(
        "COMMENT ON COLUMN sandboxes.services_error IS "
        "'what went wrong with the services inside it, before its deletion'"
    )


def downgrade() -> None:
    op.execute("ALTER TABLE sandboxes DROP COLUMN services_error")
