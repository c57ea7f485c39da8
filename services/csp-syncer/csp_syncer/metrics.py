"""The csp-syncer's metrics."""

from prometheus_client import Counter, Gauge

SYNCS = Counter("broker_sync_total", "Syncs by what came of them", ["outcome"])
HELD = Gauge("broker_sync_held", "1 while the last listing is held back for a person to look at")
SKIPPED = Counter("broker_sync_skipped_records_total", "Records of listings that lack what we need")
