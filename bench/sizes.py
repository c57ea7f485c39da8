"""How long, and how many."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Sizes:
    seconds: int = 5
    """Of load in a run."""
    warm_up: int = 2
    students: int = 1_000
    """In a class; and of those who ask again."""
    accounts: int = 100_000
    """In CSP's listing; the other maintenance is sized by it."""
    cycles: int = 1_000_000
    """Of allocation and release in the long run."""
