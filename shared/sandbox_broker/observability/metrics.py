"""The metrics that every service has."""

from prometheus_client import Counter, Gauge, Histogram

QUEUE_WAIT = Histogram(
    "broker_queue_wait_seconds",
    "From the publishing of a message to its delivery to this service, by the clocks of the two",
    ["queue"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60, 300),
)
DEAD_LETTERED = Counter(
    "broker_dead_lettered_total",
    "Messages, or single commands of one, that this service has sent to the dead letters, by where they came from",
    ["queue"],
)
CONNECTED = Gauge(
    "broker_rabbitmq_connected", "1 while this connection to RabbitMQ stands, by its name", ["connection"]
)
DISCONNECTS = Counter(
    "broker_rabbitmq_disconnects_total", "Connections to RabbitMQ that were lost or not made", ["connection"]
)
SUPPRESSED = Counter(
    "broker_log_lines_suppressed_total",
    "Warnings and errors that were counted instead of written, because too many had the same event name",
    ["event"],
)
