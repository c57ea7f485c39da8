"""Every look-up has one index that serves it and none that merely contains the row, so that no statistics can make
the planner read a wrong one from end to end."""

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


UP = """
DROP INDEX sandboxes_available, sandboxes_available_by_stem, sandboxes_available_by_name, leases_by_expiry;
ALTER TABLE sandboxes DROP COLUMN name_stem,
    ADD COLUMN available_since timestamptz
        GENERATED ALWAYS AS (CASE WHEN status = 'available' THEN status_since END) STORED,
    ADD COLUMN available_name text COLLATE "C"
        GENERATED ALWAYS AS (CASE WHEN status = 'available' THEN name END) STORED,
    ADD COLUMN available_stem text COLLATE "C"
        GENERATED ALWAYS AS (CASE WHEN status = 'available' THEN rtrim(name, '0123456789') END) STORED;
COMMENT ON COLUMN sandboxes.available_name IS 'the name, while it is available';
COMMENT ON COLUMN sandboxes.available_stem IS 'the name without its number, while it is available';
CREATE INDEX sandboxes_available ON sandboxes (available_since, sandbox_id) WHERE available_since IS NOT NULL;
CREATE INDEX sandboxes_available_by_name ON sandboxes (available_name) WHERE available_name IS NOT NULL;
CREATE INDEX sandboxes_available_by_stem ON sandboxes (available_stem, status_since, sandbox_id)
    WHERE available_stem IS NOT NULL;
CREATE INDEX leases_by_expiry ON leases (expires_at) WHERE end_reason IS NULL
"""

DOWN = """
DROP INDEX leases_by_expiry;
CREATE INDEX leases_by_expiry ON leases (expires_at) WHERE ended_at IS NULL;
ALTER TABLE sandboxes DROP COLUMN available_since, DROP COLUMN available_name, DROP COLUMN available_stem,
    ADD COLUMN name_stem text COLLATE "C" GENERATED ALWAYS AS (rtrim(name, '0123456789')) STORED;
COMMENT ON COLUMN sandboxes.name_stem IS 'the name without its number';
CREATE INDEX sandboxes_available ON sandboxes (status_since, sandbox_id) WHERE status = 'available';
CREATE INDEX sandboxes_available_by_name ON sandboxes (name) WHERE status = 'available';
CREATE INDEX sandboxes_available_by_stem ON sandboxes (name_stem, status_since, sandbox_id)
    WHERE status = 'available'
"""


def upgrade() -> None:
    for statement in UP.strip().split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN.strip().split(";\n"):
        op.execute(statement)
