"""Metrics of every service."""

from prometheus_client import Counter, Gauge, Histogram

QUEUE_WAIT = Histogram(
    "broker_queue_wait_seconds",
    "Time from the publication of a message to its delivery to this service, by the clocks of both services",
    ["queue"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300),
)
DEAD_LETTERED = Counter(
    "broker_dead_lettered_total",
    "Messages and single commands sent to the dead letters by this service, by their queue",
    ["queue"],
)
CONNECTED = Gauge(
    "broker_rabbitmq_connected", "1 while this connection to RabbitMQ is open, by its name", ["connection"]
)
DISCONNECTS = Counter(
    "broker_rabbitmq_disconnects_total",
    "Lost connections to RabbitMQ and failed attempts to connect",
    ["connection"],
)
SUPPRESSED = Counter(
    "broker_log_lines_suppressed_total",
    "Warnings and errors suppressed by the log rate limit, by event name",
    ["event"],
)
