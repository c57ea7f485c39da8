"""Policies, and the terms under which each lease was granted."""

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

TABLES = """
CREATE TABLE policies (
    name text COLLATE "C" PRIMARY KEY,
    document jsonb NOT NULL,
    quota_grants bigint NOT NULL DEFAULT 0
);
CREATE TABLE policy_set (
    only_row integer PRIMARY KEY DEFAULT 1,
    version bigint NOT NULL DEFAULT 0,
    applied_at timestamptz,
    CONSTRAINT policy_set_only_row CHECK (only_row = 1)
);
INSERT INTO policy_set DEFAULT VALUES;
ALTER TABLE allocator_epoch ADD COLUMN policy_version bigint NOT NULL DEFAULT 0;
ALTER TABLE leases
    ADD COLUMN policy text COLLATE "C",
    ADD COLUMN lease_sec integer,
    ADD COLUMN max_extension_sec integer,
    ADD COLUMN standby_sec integer,
    ADD COLUMN max_replacements integer;
CREATE INDEX leases_active_by_policy ON leases (policy) WHERE policy IS NOT NULL AND num_nonnulls(ended_at) = 0
"""
STOCK_RULES = """
CREATE VIEW stock_rules AS
SELECT name AS policy,
    (document #>> '{stock,name_prefix}') COLLATE "C" AS name_prefix,
    (document #> '{stock,min}')::integer AS min,
    (document #> '{stock,max}')::integer AS max,
    document #> '{stock,admin_user}' AS admin_user
FROM policies
WHERE document ? 'stock'
"""
COMMENTS = {
    "TABLE policies": "rules of labs, as an administrator applied them",
    "COLUMN policies.document": "the fields that the administrator set",
    "COLUMN policies.quota_grants": "raised by each statement that grants leases under max_active, so that of two "
    "concurrent statements the second grants none",
    "TABLE policy_set": "the version of all policies",
    "COLUMN allocator_epoch.policy_version": "the policies that a statement of this queue must use",
    "COLUMN leases.policy": "name of the policy that granted it; null for the defaults",
    "COLUMN leases.lease_sec": "granted lease time; null for a lease of an earlier version",
    "COLUMN leases.max_extension_sec": "granted limit of all extensions together",
    "COLUMN leases.standby_sec": "granted time until the claim of a standby lease",
    "COLUMN leases.max_replacements": "granted replacements",
    "VIEW stock_rules": "the stock rules of the policies",
}


def upgrade() -> None:
    for statement in (*TABLES.split(";"), STOCK_RULES):
        op.execute(statement)
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON {name} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP VIEW stock_rules")
    op.execute("DROP TABLE policies, policy_set")
    op.execute("ALTER TABLE allocator_epoch DROP COLUMN policy_version")
    op.execute(
        "ALTER TABLE leases DROP COLUMN policy, DROP COLUMN lease_sec, DROP COLUMN max_extension_sec, "
        "DROP COLUMN standby_sec, DROP COLUMN max_replacements"
    )
