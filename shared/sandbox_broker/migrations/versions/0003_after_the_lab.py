"""What comes after the lab: jobs, when a sandbox was deleted, why an administrator ended a lease."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


UP = """
CREATE TABLE jobs (
    job_id uuid PRIMARY KEY,
    kind text NOT NULL,
    state text NOT NULL,
    progress jsonb NOT NULL DEFAULT '{}',
    result jsonb,
    started_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT jobs_kind CHECK (kind IN ('sync', 'cleanup')),
    CONSTRAINT jobs_state CHECK (state IN ('running', 'completed', 'held', 'failed'))
);
COMMENT ON TABLE jobs IS 'what an administrator has started, and how it goes';
ALTER TABLE sandboxes ADD COLUMN deleted_at timestamptz;
UPDATE sandboxes SET deleted_at = status_since WHERE status = 'deleted';
ALTER TABLE leases ADD COLUMN end_note text;
COMMENT ON COLUMN leases.end_note IS 'what the administrator gave as a reason';
"""

DOWN = """
ALTER TABLE leases DROP COLUMN end_note;
ALTER TABLE sandboxes DROP COLUMN deleted_at;
DROP TABLE jobs;
"""


def upgrade() -> None:
    for statement in UP.strip().split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN.strip().split(";\n"):
        op.execute(statement)
