"""The gateway's metrics."""

from functools import cache

from prometheus_client import Counter, Gauge, Histogram

_REQUEST_LATENCY = Histogram(
    "broker_request_latency_seconds", "HTTP requests by route and status", ["method", "endpoint", "status"]
)


@cache
def request_latency(method: str, endpoint: str, status: int) -> Histogram:
    """One combination of labels, of which there are few; finding it costs more than observing."""
    return _REQUEST_LATENCY.labels(method, endpoint, status)


ALLOCATIONS = Counter("broker_allocate_total", "Answers to POST /v1/allocate", ["outcome"])
ALLOCATED, REPEATED = (ALLOCATIONS.labels(outcome) for outcome in ("allocated", "idempotent"))
IDEMPOTENT_HITS = Counter(
    "broker_allocate_idempotent_hits_total", "Allocations answered with the lease the student had"
)
ALLOCATION_LATENCY = Histogram(
    "broker_allocation_latency_seconds",
    "From a valid request to its answer",
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
AUTH_FAILURES = Counter(
    "broker_auth_failures_total",
    "Requests that were refused for their token: missing, unknown, or a track token on an admin route (forbidden)",
    ["reason"],
)
SLOW_CLIENTS = Counter(
    "broker_slow_clients_total",
    "Connections cut off: a client did not finish its request or read its response in time, or sent too much",
    ["reason"],
)
DELETIONS_MARKED = Counter("broker_deletion_marked_total", "Answers to mark-for-deletion", ["outcome"])
IN_FLIGHT = Gauge("broker_gateway_in_flight", "Requests that wait for the allocator's answer")

# Of each queue; every gateway tells the same.
QUEUE_DEPTH = Gauge("broker_queue_depth", "Messages that wait to be taken", ["queue"])
QUEUE_AGE = Gauge(
    "broker_queue_oldest_message_age_seconds",
    "How old the oldest message can be at most: since when this gateway has not seen the queue empty",
    ["queue"],
)
QUEUE_CONSUMERS = Gauge("broker_queue_consumers", "Consumers, those that stand by included", ["queue"])
