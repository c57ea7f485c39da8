"""The csp-syncer's metrics."""

from prometheus_client import Counter

SYNCS = Counter("broker_sync_total", "Syncs by what came of them", ["outcome"])
SKIPPED = Counter("broker_sync_skipped_records_total", "Records of listings that lack what we need")
