"""An epoch for each queue of the allocator; no two queues ever have the same one."""

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


UP = """
CREATE SEQUENCE allocator_epochs;
SELECT setval('allocator_epochs', epoch + 1) FROM allocator_epoch;
DROP TABLE allocator_epoch;
CREATE TABLE allocator_epoch (
    queue text PRIMARY KEY,
    epoch bigint NOT NULL DEFAULT nextval('allocator_epochs'),
    backend_pid integer
);
CREATE UNIQUE INDEX allocator_epoch_once ON allocator_epoch (epoch);
COMMENT ON TABLE allocator_epoch IS
    'who may write: for each queue of the allocator the epoch of its newest consumer';
INSERT INTO allocator_epoch (queue) VALUES ('allocator.commands'), ('allocator.maintenance');
"""

DOWN = """
DROP TABLE allocator_epoch;
CREATE TABLE allocator_epoch (
    only_row integer PRIMARY KEY DEFAULT 1,
    epoch bigint NOT NULL DEFAULT 0,
    backend_pid integer,
    CONSTRAINT allocator_epoch_only_row CHECK (only_row = 1)
);
INSERT INTO allocator_epoch (epoch) SELECT nextval('allocator_epochs');
DROP SEQUENCE allocator_epochs;
"""


def upgrade() -> None:
    for statement in UP.strip().split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN.strip().split(";\n"):
        op.execute(statement)
