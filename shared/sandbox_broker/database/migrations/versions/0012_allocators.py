"""Running allocators, so that two brokers on one database notice each other."""

from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE allocators (
    allocator_id uuid PRIMARY KEY,
    presence_queue text NOT NULL,
    reports bigint NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT now(),
    seen_at timestamptz NOT NULL DEFAULT now(),
    other_broker_at timestamptz
)
"""
COMMENTS = {
    "TABLE allocators": "allocators that report about twice a second",
    "COLUMN allocators.presence_queue": "its exclusive queue, which exists only in the RabbitMQ of its broker",
    "COLUMN allocators.other_broker_at": "last time it has seen an allocator of another broker",
}


def upgrade() -> None:
    op.execute(TABLE)
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP TABLE allocators")
