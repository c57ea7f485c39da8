"""Names without their numbers, so that the oldest sandbox of a prefix is found by index."""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.execute(
        'ALTER TABLE sandboxes ADD COLUMN name_stem text COLLATE "C" '
        "GENERATED ALWAYS AS (rtrim(name, '0123456789')) STORED"
    )
    op.execute("COMMENT ON COLUMN sandboxes.name_stem IS 'the name without its number'")
    op.execute(
        "CREATE INDEX sandboxes_available_by_stem ON sandboxes (name_stem, status_since, sandbox_id) "
        "WHERE status = 'available'"
    )


def downgrade() -> None:
    op.execute("ALTER TABLE sandboxes DROP COLUMN name_stem")
