"""Metrics of the console."""

from prometheus_client import Counter, Gauge, Histogram

PAGE_SECONDS = Histogram(
    "broker_console_request_seconds",
    "Duration of requests to the console by route and status",
    ["method", "endpoint", "status"],
)
GATEWAY_ERRORS = Counter(
    "broker_console_gateway_errors_total",
    "Requests of the console that the gateway did not answer, or answered with 5xx",
)
SIGN_INS = Counter(
    "broker_console_sign_ins_total",
    "Attempts to sign in by method and outcome",
    ["method", "outcome"],
)
STREAMS = Gauge("broker_console_streams", "Open pages with live updates")
for _method in ("token", "oidc"):
    for _outcome in ("accepted", "refused"):
        SIGN_INS.labels(_method, _outcome)
