"""Durations and counts of a benchmark."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    seconds: int = 5
    """Duration of the load in a run."""
    warm_up: int = 2
    """Seconds of load before the measurement."""
    students: int = 1_000
    """Students of a class, and of the scenario `repeat-200`."""
    accounts: int = 100_000
    """Accounts in CSP's listing. The other maintenance scenarios scale with it."""
    cycles: int = 1_000_000
    """Allocations and releases in the soak test."""
