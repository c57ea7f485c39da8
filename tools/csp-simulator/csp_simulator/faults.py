"""How the simulator misbehaves: the switches as they are set, and the chance that applies them."""

import asyncio
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from csp_simulator.answers import failure
from csp_simulator.switches import OPERATIONS, SWITCHES, problems


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one call."""

    latency_sec: float
    failure: Response | None
    effect_despite_failure: bool


class Faults:
    """With the switches at their defaults everything is done right and at once."""

    def __init__(self, seed: int | None) -> None:
        self._seed = seed
        self.reset()

    def reset(self, seed: int | None = None) -> None:
        """Behave well again, and begin the seeded chance anew; with another seed if one is given."""
        if seed is not None:
            self._seed = seed
        self.settings: dict[str, Any] = {name: switch.default for name, switch in SWITCHES.items()}
        # One for each operation: what the deletions meet must not depend on how many listings there are.
        self._chance = {
            operation: random.Random(None if self._seed is None else f"{self._seed}/{operation}")
            for operation in OPERATIONS
        }

    def patch(self, changes: Mapping[str, Any]) -> None:
        """Set these switches, all or none; ValueError says which is unknown or wrong."""
        if wrong := problems(changes):
            raise ValueError("; ".join(wrong))
        self.settings |= changes

    async def play(self, operation: str, effect: Callable[[], Response]) -> Response:
        """Judge a call as it arrives, wait out its latency, and only then let it take effect.

        So an account that is being deleted stays listed until its deletion is answered, and of two
        deletions of the same account the one that ends later finds it gone. A client that goes away
        meanwhile stops nothing.
        """
        verdict = self._judge(operation)
        await asyncio.sleep(verdict.latency_sec)
        if verdict.failure is None:
            return effect()
        if verdict.effect_despite_failure:
            effect()
        return verdict.failure

    def _judge(self, operation: str) -> Verdict:
        settings = self.settings
        # Always as many draws, so that setting one switch does not change what the others meet.
        slower, fails, which = (self._chance[operation].random() for _ in range(3))
        next_ones = f"fail_next_{OPERATIONS[operation]}"
        failed = None
        if settings[next_ones] > 0 or fails < settings[f"{operation}_error_rate"]:
            settings[next_ones] = max(0, settings[next_ones] - 1)
            status = settings[f"{operation}_error_status"]
            failed = failure(
                status[int(which * len(status))] if isinstance(status, list) else status,
                html=settings[f"{operation}_error_html"],
                retry_after_sec=settings["retry_after_sec"],
            )
        return Verdict(
            settings[f"{operation}_latency_sec"] + slower * settings[f"{operation}_latency_spread_sec"],
            failed,
            settings.get(f"{operation}_error_after_effect", False),
        )
