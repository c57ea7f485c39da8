"""The csp-syncer's metrics."""

from prometheus_client import Counter, Gauge, Histogram

SYNCS = Counter("broker_sync_total", "Syncs by what came of them", ["outcome"])
SKIPPED = Counter("broker_sync_skipped_records_total", "Records of listings that lack what we need")
DURATION = Histogram(
    "broker_sync_duration_seconds",
    "Syncs that were completed, from the beginning of the listing to the last name",
    buckets=(0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300),
)
LAST_COMPLETED = Gauge("broker_sync_last_completed_timestamp_seconds", "When this csp-syncer last completed a sync")
