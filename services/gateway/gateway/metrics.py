"""Metrics of the gateway."""

from functools import cache

from prometheus_client import Counter, Gauge, Histogram

_REQUEST_LATENCY = Histogram(
    "broker_request_latency_seconds",
    "Duration of HTTP requests by route and status",
    ["method", "endpoint", "status"],
)


@cache
def request_latency(method: str, endpoint: str, status: int) -> Histogram:
    """Return the histogram of these labels. It is cached, because a look-up costs more than observing."""
    return _REQUEST_LATENCY.labels(method, endpoint, status)


ALLOCATIONS = Counter("broker_allocate_total", "Responses to POST /v1/allocate by outcome", ["outcome"])
ALLOCATED, REPEATED, WAITING = (ALLOCATIONS.labels(outcome) for outcome in ("allocated", "idempotent", "waiting"))
IDEMPOTENT_HITS = Counter(
    "broker_allocate_idempotent_hits_total", "Allocations that returned the existing lease of the student"
)
ALLOCATION_LATENCY = Histogram(
    "broker_allocation_latency_seconds",
    "Duration of an allocation, from a valid request to its response",
    buckets=(0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5),
)
AUTH_FAILURES = Counter(
    "broker_auth_failures_total",
    "Requests refused because of their token: missing, unknown, or a track token on an admin route (forbidden)",
    ["reason"],
)
ADDRESSES_WITH_MANY_STUDENTS = Counter(
    "broker_addresses_with_many_students_total",
    "Client addresses with more students than STUDENTS_PER_ADDRESS_ALERT, each once per window",
)
SLOW_CLIENTS = Counter(
    "broker_slow_clients_total",
    "Connections closed by the gateway: an unfinished request, an unread response, too much data or too many "
    "connections",
    ["reason"],
)
DELETIONS_MARKED = Counter("broker_deletion_marked_total", "Responses to mark-for-deletion by outcome", ["outcome"])
LEASE_CHANGES = Counter(
    "broker_lease_change_requests_total",
    "Requests to claim, extend or replace a lease, by outcome: done, repeated, waiting, or the error code in small "
    "letters",
    ["change", "outcome"],
)
ACCESS_REQUESTS = Counter(
    "broker_access_requests_total", "Requests for the login inside a sandbox by outcome", ["outcome"]
)
INSTRUQT_EVENTS = Counter(
    "broker_instruqt_events_total",
    "Events of Instruqt by outcome, refused ones included",
    ["outcome"],
)
IN_FLIGHT = Gauge("broker_gateway_in_flight", "Requests that wait for a reply of the allocator")

# Metrics of each queue. Every gateway reports the same values.
QUEUE_DEPTH = Gauge("broker_queue_depth", "Messages that wait for delivery", ["queue"])
QUEUE_AGE = Gauge(
    "broker_queue_oldest_message_age_seconds",
    "Upper bound of the age of the oldest message: time since this gateway last saw the queue empty",
    ["queue"],
)
QUEUE_CONSUMERS = Gauge("broker_queue_consumers", "Consumers, including standby consumers", ["queue"])
EVENT_STREAMS = Gauge("broker_event_streams", "Open streams of GET /v1/admin/events")
EVENT_STREAMS_DROPPED = Counter(
    "broker_event_streams_dropped_total",
    "Streams that the gateway refused because of too_many others, or ended because the client was slow",
    ["reason"],
)
for _reason in ("slow", "too_many"):
    EVENT_STREAMS_DROPPED.labels(_reason)
