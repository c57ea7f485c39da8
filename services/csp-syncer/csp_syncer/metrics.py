"""Metrics of the csp-syncer."""

from prometheus_client import Counter, Gauge, Histogram

SYNCS = Counter("broker_sync_total", "Syncs by outcome", ["outcome"])
SKIPPED = Counter("broker_sync_skipped_records_total", "Records of listings without a required field")
NOT_ALLOWED = Gauge(
    "broker_sync_not_allowed_accounts", "Accounts of the last listing whose names SYNC_NAME_ALLOW does not permit"
)
DURATION = Histogram(
    "broker_sync_duration_seconds",
    "Duration of completed syncs, from the start of the listing to the last corrected name",
    buckets=(0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300),
)
LAST_COMPLETED = Gauge(
    "broker_sync_last_completed_timestamp_seconds",
    "Time of the last completed sync of this csp-syncer; 0 before the first one since its start",
)
