"""Prometheus metrics of the allocator."""

import math
from collections.abc import Iterable, Mapping

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Metric
from prometheus_client.registry import Collector


class GaugeWithTotal(Collector):
    """Gauge with one series without labels and one series for each value of a label. Gauge has either or."""

    def __init__(self, name: str, documentation: str, label: str) -> None:
        self.name, self.documentation, self.label = name, documentation, label
        self.total = math.inf
        self.parts: Mapping[str, float] = {}
        """Value of the label -> value of its series."""
        REGISTRY.register(self)

    def collect(self) -> Iterable[Metric]:
        metric = Metric(self.name, self.documentation, "gauge")
        metric.add_sample(self.name, {}, self.total)
        for value, number in self.parts.items():
            metric.add_sample(self.name, {self.label: value}, number)
        yield metric


ALLOCATIONS = Counter("broker_allocator_outcomes_total", "Allocation requests by outcome", ["outcome"])
EXPIRED = Counter("broker_expiry_orphaned_total", "Leases that the allocator ended because they were overdue")
UNCLAIMED = Counter("broker_standby_unclaimed_total", "Standby leases that ended without a claim")
LEASE_CHANGES = Counter(
    "broker_lease_changes_total",
    "Requests to claim, extend or replace, by outcome: done, repeated, waiting, or the error code in small letters",
    ["change", "outcome"],
)
REPLACED = LEASE_CHANGES.labels("replace", "done")
"""Exported from the start, so that the first replacements count in a rate."""
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
REFUSALS_NOT_AUDITED = Counter(
    "broker_audit_refusals_skipped_total",
    "Refusals for scope without an entry in the audit, beyond 10 entries per token and minute",
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
CREATIONS = Counter(
    "broker_stock_creations_total",
    "Recorded results of creation intents. postponed: a failed attempt that is repeated",
    ["name_prefix", "outcome"],
)
CREATION = Histogram(
    "broker_stock_creation_seconds",
    "Time from the first claim of a creation intent until its sandbox is available",
    buckets=(1, 5, 10, 30, 60, 90, 120, 150, 180, 240, 300, 450, 600, 900, 1800, 3600),
)
ACCESS_READY = Histogram(
    "broker_access_ready_seconds",
    "Time from the begin of a lease until its login inside the sandbox is ready",
    buckets=(1, 2, 5, 10, 20, 30, 45, 60, 90, 120, 180, 300, 600, 1800),
)
ACCESS_LOGINS = {
    state: Gauge(f"broker_access_{state}", meaning)
    for state, meaning in {
        "pending": "Logins inside sandboxes that the provisioner has to create",
        "failed": "Logins inside sandboxes whose creation failed; the provisioner tries them again",
        "removing": "Logins of ended leases whose users the provisioner has to delete",
        "remains": "Users of the leases that ended within the last day, which remain in CSP, because the deletion "
        "of their account did not wait longer",
    }.items()
}
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
EXHAUSTION = GaugeWithTotal(
    "broker_pool_exhaustion_seconds",
    "Seconds until the pool is empty at the rate of new leases of the last five minutes; +Inf without new leases. "
    "With name_prefix: until the prefix of a stock rule is empty at the higher rate of the last five minutes and "
    "of the coming hour a week ago",
    "name_prefix",
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
    "timed_out: the longest wait was over. refused: the request could no longer succeed. play_ended: Instruqt "
    "ended the play",
    ["reason"],
)
STOCK = {
    level: Gauge(f"broker_stock_{level}", meaning, ["name_prefix"])
    for level, meaning in {
        "available": "Available sandboxes of a stock rule",
        "allocated": "Leased sandboxes of a stock rule",
        "creating": "Creation intents in flight of a stock rule",
        "waiting": "Students in the waiting line that a stock rule fits",
        "min": "Number of available sandboxes below which the broker creates more",
        "max": "Highest number of available and leased sandboxes and intents in flight together",
        "target": "min plus the waiting students, at most max",
        "failures": "Consecutive failed attempts to create an account for a stock rule",
    }.items()
}
STOCK_STOPPED = Gauge(
    "broker_stock_stopped",
    "1 while no account is created for a stock rule until an administrator resumes it, else 0",
    ["name_prefix"],
)
STOCK_CREATION = Gauge(
    "broker_stock_measured_creation_seconds",
    "Time from the first claim of a creation intent until its sandbox is available: quantiles of the last 50 "
    "creations of a stock rule. No series before the first creation",
    ["name_prefix", "quantile"],
)
