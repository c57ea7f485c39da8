"""What comes after the lab: one clean-up at a time, jobs, and what an administrator wants to know later."""

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
CREATE TABLE cleanup_duty (
    only_row integer PRIMARY KEY DEFAULT 1,
    run_id uuid,
    until timestamptz NOT NULL DEFAULT 'epoch',
    CONSTRAINT cleanup_duty_only_row CHECK (only_row = 1)
);
INSERT INTO cleanup_duty DEFAULT VALUES;
COMMENT ON TABLE cleanup_duty IS 'which clean-up run may delete, and until when without asking again';
ALTER TABLE sandboxes ADD COLUMN deletion_claim uuid;
COMMENT ON COLUMN sandboxes.deletion_claim IS 'the clean-up run that has it in hand, or had it last';
ALTER TABLE sandboxes ADD COLUMN deleted_at timestamptz;
UPDATE sandboxes SET deleted_at = status_since WHERE status = 'deleted';
ALTER TABLE leases ADD COLUMN end_note text;
COMMENT ON COLUMN leases.end_note IS 'what the administrator gave as a reason';
"""

DOWN = """
ALTER TABLE leases DROP COLUMN end_note;
ALTER TABLE sandboxes DROP COLUMN deleted_at;
ALTER TABLE sandboxes DROP COLUMN deletion_claim;
DROP TABLE cleanup_duty, jobs;
"""


def upgrade() -> None:
    for statement in UP.strip().split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN.strip().split(";\n"):
        op.execute(statement)
