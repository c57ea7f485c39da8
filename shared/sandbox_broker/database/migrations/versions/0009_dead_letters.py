"""Dead letters lie in a table, where they can be looked through without being taken out."""

from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


UP = """
CREATE TABLE dead_letters (
    dead_letter_id uuid PRIMARY KEY,
    died_at timestamptz NOT NULL,
    queue text NOT NULL,
    reason text NOT NULL,
    commands text[] NOT NULL,
    message_id text,
    correlation_id text,
    content_type text,
    body bytea NOT NULL
);
COMMENT ON TABLE dead_letters IS 'messages that could not be processed, until a person replays or drops them';
COMMENT ON COLUMN dead_letters.queue IS 'that it died in';
COMMENT ON COLUMN dead_letters.commands IS 'their types, as far as they can be read';
CREATE INDEX dead_letters_by_time ON dead_letters (died_at, dead_letter_id)
"""

DOWN = "DROP TABLE dead_letters"


def upgrade() -> None:
    for statement in UP.strip().split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    op.execute(DOWN)
