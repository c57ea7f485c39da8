"""Views for the totals of the pool and for the newest listings, so that each definition exists once."""

from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

POOL_TOTALS = """
CREATE VIEW pool_totals AS
SELECT status, sum(number)::bigint AS number
FROM (
    SELECT status, number FROM pool_counts WHERE kind = 'pool' UNION ALL SELECT status, number FROM pool_changes
) counted
GROUP BY status
"""
APPLIED_LISTING = """
CREATE VIEW applied_listing AS
SELECT listing_id, begun_at, applied_at, outcome FROM csp_listings
WHERE applied_at IS NOT NULL ORDER BY listing_id DESC LIMIT 1
"""
DECIDED_LISTING = """
CREATE VIEW decided_listing AS
SELECT listing_id, begun_at, applied_at, held_at, outcome FROM csp_listings
WHERE applied_at IS NOT NULL OR held_at IS NOT NULL ORDER BY listing_id DESC LIMIT 1
"""
COMMENTS = {
    "pool_totals": "number of sandboxes in each status, exact in every snapshot",
    "applied_listing": "the last applied listing; no row before the first",
    "decided_listing": "the newest listing that was applied or is held; no row before the first",
}


def upgrade() -> None:
    for view in (POOL_TOTALS, APPLIED_LISTING, DECIDED_LISTING):
        op.execute(view)
    for name, comment in COMMENTS.items():
        op.execute(f"COMMENT ON VIEW {name} IS '{comment}'")


def downgrade() -> None:
    op.execute("DROP VIEW pool_totals, applied_listing, decided_listing")
