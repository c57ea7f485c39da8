"""The reaper's metrics."""

from prometheus_client import Counter, Gauge

DELETED = Counter("broker_cleanup_deleted_total", "Sandboxes that CSP deleted, or no longer had")
FAILED = Counter("broker_cleanup_failed_total", "Attempts to delete that failed")
UNAUTHORIZED = Gauge("broker_csp_unauthorized", "1 while CSP refuses our token and deletions wait")
CIRCUIT = Gauge("broker_circuit_state", "Whether CSP is asked to delete: 0 closed, 1 half-open, 2 open")
SERVICES_FAILED = Counter("broker_cleanup_services_failed_total", "Sandboxes whose services could not be removed")
