"""Listings that can be held and compared with; what is to be purged is found by an index."""

from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


UP = """
ALTER TABLE csp_listings ADD COLUMN held_at timestamptz;
ALTER TABLE csp_listings ADD COLUMN outcome jsonb;
COMMENT ON COLUMN csp_listings.outcome IS 'what it has done, or, while it is held, would do';
DROP TABLE csp_accounts;
CREATE UNLOGGED TABLE csp_accounts (
    listing_id bigint,
    sandbox_id text,
    external_id text,
    name text COLLATE "C",
    sfdc_account_id text,
    created_at timestamptz,
    PRIMARY KEY (listing_id, sandbox_id)
);
CREATE UNIQUE INDEX csp_accounts_once ON csp_accounts (listing_id, external_id);
COMMENT ON TABLE csp_accounts IS
    'what the last applied listing of CSP contains, and what is staged of the next';
COMMENT ON COLUMN csp_accounts.external_id IS
    'null where the record could not be read further than its csp_id';
CREATE INDEX sandboxes_to_purge ON sandboxes (status, status_since)
    WHERE status IN ('stale', 'deletion_failed', 'deleted');
"""

DOWN = """
DROP INDEX sandboxes_to_purge;
DROP TABLE csp_accounts;
CREATE TABLE csp_accounts (
    external_id text PRIMARY KEY,
    sandbox_id text NOT NULL,
    name text COLLATE "C" NOT NULL,
    sfdc_account_id text,
    created_at timestamptz,
    listing_id bigint NOT NULL
);
COMMENT ON TABLE csp_accounts IS
    'what CSP last listed; a listing is staged here until it is complete';
CREATE INDEX csp_accounts_by_listing ON csp_accounts (listing_id);
ALTER TABLE csp_listings DROP COLUMN outcome;
ALTER TABLE csp_listings DROP COLUMN held_at;
"""


def upgrade() -> None:
    for statement in UP.strip().split(";\n"):
        op.execute(statement)


def downgrade() -> None:
    for statement in DOWN.strip().split(";\n"):
        op.execute(statement)
