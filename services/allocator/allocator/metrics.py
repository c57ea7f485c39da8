"""Prometheus metrics of the allocator."""

from prometheus_client import Counter, Gauge, Histogram

ALLOCATIONS = Counter("broker_allocator_outcomes_total", "Allocation requests by outcome", ["outcome"])
EXPIRED = Counter("broker_expiry_orphaned_total", "Leases that the allocator ended because they were overdue")
UNCLAIMED = Counter("broker_standby_unclaimed_total", "Standby leases that ended without a claim")
LEASE_CHANGES = Counter(
    "broker_lease_changes_total",
    "Requests to claim, extend or replace, by outcome: done, repeated, or the error code in small letters",
    ["change", "outcome"],
)
BATCH_SIZE = Histogram(
    "broker_allocator_batch_size",
    "Commands per batch",
    ["queue"],
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500),
)
COMMIT = Histogram(
    "broker_allocator_commit_seconds",
    "Duration of the statements for all commands of one type in a batch, including their commit",
    ["command"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30),
)
EPOCH = Gauge("broker_allocator_epoch", "Fencing epoch under which this allocator writes; 0 on standby", ["queue"])
OUTBOX_LAG = Gauge("broker_outbox_lag_seconds", "Age of the oldest unpublished event")
OLDEST_DELETION = Gauge(
    "broker_oldest_pending_deletion_seconds", "Age of the oldest pending deletion, counted from its request"
)
DEAD_LETTERS = Gauge("broker_dead_letters", "Dead letters: messages and commands for an operator to inspect")
REOPENED = Counter("broker_deletions_reopened_total", "Deletions reopened because CSP still lists the account")
SYNC_HELD = Gauge("broker_sync_held", "1 while the newest listing is held until an operator inspects it, else 0")
LEAKS = Gauge(
    "broker_leaks",
    "Differences between CSP and the pool. in_csp: accounts without a sandbox in the pool. "
    "missing: leased sandboxes without an account in CSP",
    ["kind"],
)
DATABASE_BEHIND = Gauge(
    "broker_database_behind", "1 while the database lacks the newest lease, as after the restore of an older backup"
)
OTHER_BROKER = Gauge(
    "broker_other_broker", "1 for ten minutes after an allocator of another broker used the same database, else 0"
)
INVARIANT_VIOLATIONS = Gauge(
    "broker_invariant_violations",
    "Violations of a rule of the pool, as last counted by the active allocator; must be 0",
    ["rule"],
)

POOL_COUNTED = Gauge(
    "broker_pool_counted_timestamp_seconds", "Time of the last pool count of this allocator: the age of its gauges"
)
STATUSES = ("available", "allocated", "pending_deletion", "stale", "deletion_failed")
POOL = {status: Gauge(f"broker_pool_{status}", f"Sandboxes with status {status}") for status in STATUSES}
STANDBY = Gauge("broker_standby_leases", "Standby leases without a claim; their sandboxes are allocated")
ON_HOLD = Gauge(
    "broker_sandboxes_on_hold", "Broken sandboxes that are not deleted yet, so that operators inspect them"
)
EXHAUSTION = Gauge(
    "broker_pool_exhaustion_seconds",
    "Seconds until the pool is empty at the rate of new leases of the last five minutes; +Inf without new leases",
)
POOL_TOTAL = Gauge("broker_pool_total", "Sandboxes in the pool, without deleted ones")

WAITING = Gauge("broker_waiting_students", "Students in the waiting line")
WAITING_OLDEST = Gauge("broker_waiting_oldest_seconds", "Longest present wait of a student in the waiting line")
WAITING_STARTED = Counter("broker_waiting_started_total", "Students that joined the waiting line")
WAITING_TIME = Histogram(
    "broker_waiting_seconds",
    "Time in the waiting line of the students that got a sandbox",
    buckets=(1, 2, 5, 10, 30, 60, 120, 300, 600, 900, 1800, 3600),
)
WAITING_ENDED = Counter(
    "broker_waiting_ended_total",
    "Students that lost their place in the waiting line without a sandbox. left: no repetition of the request. "
    "timed_out: the longest wait was over. refused: the request could no longer succeed",
    ["reason"],
)
