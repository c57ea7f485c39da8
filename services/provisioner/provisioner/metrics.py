"""Metrics of the provisioner."""

from prometheus_client import Counter, Gauge, Histogram

CREATED = Counter("broker_stock_accounts_created_total", "Accounts that CSP created")
FOUND = Counter(
    "broker_stock_accounts_found_total",
    "Accounts of an earlier attempt that the look-up by name found instead of a second creation",
)
FAILED = Counter(
    "broker_stock_creation_failures_total",
    "Failed attempts to create an account, by reason: unavailable, refused (quota or licence), invalid",
    ["reason"],
)
CIRCUIT = Gauge(
    "broker_stock_circuit_state",
    "State of the circuit breaker for creations in CSP: 0 closed, 1 half open, 2 open",
)
RUNNING = Gauge("broker_stock_creations_running", "Creations that this provisioner carries out now")
DURATION = Histogram(
    "broker_stock_creation_call_seconds",
    "Duration of successful creations in CSP, with the look-up by name before them",
    buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 120, 180, 300),
)
SYNCS = Counter("broker_stock_syncs_requested_total", "Syncs that the provisioner requested for created accounts")

LOGINS_CREATED = Counter("broker_access_created_total", "Logins that the provisioner created inside sandboxes")
LOGINS_REMOVED = Counter("broker_access_removed_total", "Users that the provisioner deleted after a lease")
LOGIN_FAILURES = Counter(
    "broker_access_failures_total",
    "Failed attempts to create or remove a login, by reason: not_ready (CSP does not switch into the account yet), "
    "unavailable, refused, sign_in (CSP refuses the administrator), key (no key decrypts the password)",
    ["reason"],
)
LOGINS_RUNNING = Gauge("broker_access_running", "Attempts to create or remove a login that run now")
SIGN_IN_REFUSED = Gauge(
    "broker_access_sign_in_refused", "1 while CSP refuses the sign-in of the broker's administrator, else 0"
)
ACCESS_CIRCUIT = Gauge(
    "broker_access_circuit_state", "State of the circuit breaker for logins: 0 closed, 1 half open, 2 open"
)

for _reason in ("not_ready", "unavailable", "refused", "sign_in", "key"):
    LOGIN_FAILURES.labels(_reason)
for _reason in ("unavailable", "refused", "invalid"):
    FAILED.labels(_reason)
