"""The waiting line: students who wait for a sandbox."""

from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None

TABLE = """
CREATE TABLE waiting (
    waiting_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    holder text COLLATE "C" NOT NULL,
    name_prefix text COLLATE "C",
    track_name text,
    command jsonb NOT NULL,
    waiting_since timestamptz NOT NULL DEFAULT now(),
    asked_at timestamptz NOT NULL DEFAULT now(),
    ends_at timestamptz NOT NULL
)
"""
COMMENTS = {
    "TABLE waiting": "the waiting line: students without a sandbox, first come, first served",
    "COLUMN waiting.waiting_id": "order of the line",
    "COLUMN waiting.name_prefix": "null if the student takes any sandbox",
    "COLUMN waiting.command": "the request, carried out when a sandbox is there",
    "COLUMN waiting.asked_at": "last repetition of the request",
    "COLUMN waiting.ends_at": "end of the longest wait",
}


def upgrade() -> None:
    op.execute(TABLE)
    op.execute("CREATE UNIQUE INDEX waiting_one_per_holder ON waiting (holder)")
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP TABLE waiting")
