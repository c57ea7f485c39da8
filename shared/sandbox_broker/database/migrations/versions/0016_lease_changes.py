"""Standby leases, extensions, and replacements of broken sandboxes."""

from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None

STATEMENTS = (
    """
    ALTER TABLE leases
        ADD COLUMN mode text NOT NULL DEFAULT 'active',
        ADD COLUMN name_prefix text COLLATE "C",
        ADD COLUMN claimed_at timestamptz,
        ADD COLUMN first_holder text COLLATE "C",
        ADD COLUMN extended_sec integer NOT NULL DEFAULT 0,
        ADD COLUMN replacements integer NOT NULL DEFAULT 0,
        ADD COLUMN replaces text COLLATE "C"
    """,
    "ALTER TABLE leases DROP CONSTRAINT leases_end_reason",
    """
    ALTER TABLE leases ADD CONSTRAINT leases_end_reason
        CHECK (end_reason IN ('student', 'expired', 'unclaimed', 'broken', 'admin'))
    """,
    "CREATE INDEX leases_standby ON leases (expires_at) WHERE mode = 'standby' AND end_reason IS NULL",
    "CREATE INDEX leases_by_first_holder ON leases (first_holder) WHERE first_holder IS NOT NULL",
    "CREATE INDEX leases_by_replaced ON leases (replaces) WHERE replaces IS NOT NULL",
    """
    CREATE TABLE lease_extensions (
        extension_id uuid PRIMARY KEY,
        lease_id bigint NOT NULL,
        extension_sec integer NOT NULL,
        expires_at timestamptz NOT NULL,
        granted_at timestamptz NOT NULL DEFAULT now()
    )
    """,
    "ALTER TABLE sandboxes ADD COLUMN deletion_hold_until timestamptz",
    """
    CREATE INDEX sandboxes_on_hold ON sandboxes (deletion_hold_until) WHERE deletion_hold_until IS NOT NULL
    """,
)
COMMENTS = {
    "COLUMN leases.mode": "standby until the claim of a standby lease",
    "COLUMN leases.name_prefix": "prefix of the sandbox name that the student asked for",
    "COLUMN leases.claimed_at": "claim of a standby lease, which starts its time",
    "COLUMN leases.first_holder": "student id under which it was taken, if the claim gave it to another one",
    "COLUMN leases.extended_sec": "all extensions by the student together",
    "COLUMN leases.replacements": "replaced sandboxes that the student had before",
    "COLUMN leases.replaces": "broken sandbox that this one replaces",
    "TABLE lease_extensions": "granted extensions, so that each is granted once",
    "COLUMN lease_extensions.expires_at": "end of the lease after the extension",
    "COLUMN sandboxes.deletion_hold_until": "a broken sandbox is kept until then for an operator",
}


def upgrade() -> None:
    for statement in STATEMENTS:
        op.execute(statement)
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP TABLE lease_extensions")
    op.execute("ALTER TABLE sandboxes DROP COLUMN deletion_hold_until")
    op.execute("UPDATE leases SET end_reason = 'expired' WHERE end_reason = 'unclaimed'")
    op.execute("UPDATE leases SET end_reason = 'student' WHERE end_reason = 'broken'")
    op.execute(
        "ALTER TABLE leases DROP COLUMN mode, DROP COLUMN name_prefix, DROP COLUMN claimed_at, "
        "DROP COLUMN first_holder, DROP COLUMN extended_sec, DROP COLUMN replacements, DROP COLUMN replaces, "
        "DROP CONSTRAINT leases_end_reason, "
        "ADD CONSTRAINT leases_end_reason CHECK (end_reason IN ('student', 'expired', 'admin'))"
    )
