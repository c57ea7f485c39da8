"""Fault injection: the current switches, and the random numbers that apply them."""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from csp_simulator.error_responses import build_failure
from csp_simulator.switches import OPERATIONS, SWITCHES, find_problems


@dataclass(frozen=True, slots=True)
class Outcome:
    """Latency and failure of one call."""

    latency_sec: float
    failure: Response | None
    effect_despite_failure: bool


class FaultInjector:
    """Fault injection for all operations. With default switches every call succeeds at once."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Restore the default switches and restart the random numbers, with another seed if one is given."""
        if seed is not None:
            self._seed = seed
        self.settings: dict[str, Any] = {name: switch.default for name, switch in SWITCHES.items()}
        # One generator per operation, because the number of listings must not change the faults of deletions.
        self._random = {
            operation: random.Random(None if self._seed is None else f"{self._seed}/{operation}")
            for operation in OPERATIONS
        }

    def update_settings(self, changes: Mapping[str, Any]) -> None:
        """Set the switches. If any is unknown or invalid, change no switch and raise ValueError."""
        if problems := find_problems(changes):
            raise ValueError("; ".join(problems))
        self.settings |= changes

    async def respond(self, operation: str, effect: Callable[[], Response], *, must_fail: bool = False) -> Response:
        """Decide the outcome at the arrival of a call, wait for its latency, then run its effect.

        An account therefore stays listed until its deletion is answered. Of two concurrent deletions of one
        account, the later one gets 404. The effect happens even if the client disconnects during the wait.
        """
        outcome = self._decide_outcome(operation, must_fail)
        await asyncio.sleep(outcome.latency_sec)
        if outcome.failure is None:
            return effect()
        if outcome.effect_despite_failure:
            effect()
        return outcome.failure

    def _decide_outcome(self, operation: str, must_fail: bool) -> Outcome:
        settings = self.settings
        # Always draw three numbers, because a switch must not shift the random sequence of the other switches.
        latency_draw, failure_draw, status_draw = (self._random[operation].random() for _ in range(3))
        fail_next = f"fail_next_{OPERATIONS[operation]}"
        failure = None
        if must_fail or settings[fail_next] > 0 or failure_draw < settings[f"{operation}_error_rate"]:
            settings[fail_next] = max(0, settings[fail_next] - 1)
            status = settings[f"{operation}_error_status"]
            failure = build_failure(
                status[int(status_draw * len(status))] if isinstance(status, list) else status,
                html=settings[f"{operation}_error_html"],
                retry_after_sec=settings["retry_after_sec"],
            )
        return Outcome(
            settings[f"{operation}_latency_sec"] + latency_draw * settings[f"{operation}_latency_spread_sec"],
            failure,
            settings.get(f"{operation}_error_after_effect", False),
        )
