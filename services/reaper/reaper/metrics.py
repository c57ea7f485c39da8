"""Metrics of the reaper."""

from prometheus_client import Counter, Gauge

DELETED = Counter("broker_cleanup_deleted_total", "Sandboxes that CSP deleted or no longer had")
FAILED = Counter("broker_cleanup_failed_total", "Failed attempts to delete a sandbox in CSP")
CIRCUIT = Gauge(
    "broker_circuit_state", "State of the circuit breaker for deletions in CSP: 0 closed, 1 half open, 2 open"
)
SERVICES_FAILED = Counter(
    "broker_cleanup_services_failed_total", "Sandboxes whose NIOSXaaS services could not be removed"
)
