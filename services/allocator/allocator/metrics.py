"""The allocator's metrics."""

from prometheus_client import Counter, Gauge, Histogram

ALLOCATIONS = Counter("broker_allocator_outcomes_total", "Allocation requests by what came of them", ["outcome"])
EXPIRED = Counter("broker_expiry_orphaned_total", "Leases ended because they were overdue")
BATCH_SIZE = Histogram(
    "broker_allocator_batch_size",
    "Commands handled together",
    ["queue"],
    buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500),
)
COMMIT = Histogram(
    "broker_allocator_commit_seconds",
    "From sending the statements for the commands of one kind in a batch to their commit",
    ["command"],
    buckets=(0.001, 0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 30),
)
EPOCH = Gauge("broker_allocator_epoch", "The epoch this allocator writes under; 0 while it stands by", ["queue"])
OUTBOX_LAG = Gauge("broker_outbox_lag_seconds", "Age of the oldest event that is not published yet")
OLDEST_DELETION = Gauge(
    "broker_oldest_pending_deletion_seconds", "Since when the oldest pending deletion has been asked for"
)
DEAD_LETTERS = Gauge("broker_dead_letters", "Messages that could not be processed and wait for a person")
REOPENED = Counter("broker_deletions_reopened_total", "Deletions to be done again: CSP still lists the account")
SYNC_HELD = Gauge("broker_sync_held", "1 while the newest listing is held back for a person to look at")
LEAKS = Gauge(
    "broker_leaks",
    "Differences between CSP and us: in_csp are accounts that are not in the pool, missing are held by a student",
    ["kind"],
)
INVARIANT_VIOLATIONS = Gauge(
    "broker_invariant_violations",
    "What contradicts a rule of the pool, as the allocator at work last saw it; must be 0",
    ["rule"],
)

POOL_COUNTED = Gauge(
    "broker_pool_counted_timestamp_seconds", "When this allocator last counted the pool: how old its gauges are"
)
STATUSES = ("available", "allocated", "pending_deletion", "stale", "deletion_failed")
POOL = {status: Gauge(f"broker_pool_{status}", f"Sandboxes that are {status}") for status in STATUSES}
EXHAUSTION = Gauge(
    "broker_pool_exhaustion_seconds",
    "How long the available sandboxes last at the rate of new leases of the last five minutes; +Inf without any",
)
POOL_TOTAL = Gauge("broker_pool_total", "Sandboxes in the pool, the deleted ones not counted")
