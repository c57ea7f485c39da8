"""Scripts of faults over time, such as a bad day. The clock of a script can run faster than real time."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from csp_simulator.accounts import AccountStore
from csp_simulator.faults import FaultInjector
from csp_simulator.switches import find_problems, is_count, is_number

DISTURBANCES = ("add", "drop", "rename", "new_id")

_SCRIPTS = resources.files("csp_simulator").joinpath("scripts")


class ScriptError(Exception):
    """Invalid script. The message is one line."""


@dataclass(frozen=True, slots=True)
class Step:
    at_sec: float  # since the start of the script, on its own clock
    behaviour: Mapping[str, Any]
    accounts: Mapping[str, int]


def list_bundled() -> list[str]:
    """List the names of the scripts in this package."""
    return sorted(file.name.removesuffix(".json") for file in _SCRIPTS.iterdir() if file.name.endswith(".json"))


def load(name: str) -> list[Step]:
    """Load a script of this package. `name` is one of `list_bundled()`."""
    return parse(json.loads(_SCRIPTS.joinpath(f"{name}.json").read_bytes())["steps"])


def parse(steps: object) -> list[Step]:
    """Validate the steps of a script. Raises `ScriptError`, which names the invalid step."""
    if not isinstance(steps, list):
        raise ScriptError("steps must be a list")
    parsed: list[Step] = []
    for index, step in enumerate(steps):
        try:
            parsed.append(_parse_step(step, after_sec=parsed[-1].at_sec if parsed else 0.0))
        except ScriptError as error:
            raise ScriptError(f"steps[{index}]: {error}") from error
    return parsed


def _parse_step(step: object, after_sec: float) -> Step:
    if not isinstance(step, dict) or not step.keys() <= {"at_sec", "behaviour", "accounts"}:
        raise ScriptError("must be an object with at_sec, and behaviour, accounts or both")
    at_sec, behaviour, accounts = step.get("at_sec"), step.get("behaviour", {}), step.get("accounts", {})
    if not is_number(at_sec, after_sec, 10**7):
        raise ScriptError("at_sec must be seconds, at least those of the previous step")
    if not isinstance(behaviour, dict) or not isinstance(accounts, dict):
        raise ScriptError("behaviour and accounts must be objects")
    if problems := find_problems(behaviour):
        raise ScriptError("; ".join(problems))
    return Step(at_sec, behaviour, parse_disturbances(accounts))


def parse_disturbances(body: Mapping[str, object]) -> dict[str, int]:
    """Return the numbers of accounts to add, drop, rename and give a new id. Raises `ScriptError`."""
    counts: dict[str, int] = {}
    for name, count in body.items():
        if name not in DISTURBANCES or not is_count(count):
            raise ScriptError(f"{name} must be one of {', '.join(DISTURBANCES)}, with an integer from 0")
        counts[name] = count
    return counts


class ScriptPlayer:
    """Player of one script at a time.

    It needs no background task, because every request applies the due steps first.
    """

    def __init__(
        self,
        faults: FaultInjector,
        accounts: AccountStore,
        name_prefix: str,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._faults = faults
        self._accounts = accounts
        self._name_prefix = name_prefix
        self._now = now
        self.play([], speed=1)

    def play(self, steps: list[Step], speed: float) -> None:
        """Start `steps` in place of the current script. All its durations are divided by `speed`."""
        self._steps, self._speed = steps, speed
        self._steps_done, self._started_at = 0, self._now()
        self.apply_due_steps()

    def stop(self) -> None:
        """Stop the script. Its changes stay."""
        self.play([], speed=1)

    def apply_due_steps(self) -> None:
        while self._steps_done < len(self._steps) and self._steps[self._steps_done].at_sec <= self._elapsed_sec():
            self._apply_step(self._steps[self._steps_done])
            self._steps_done += 1

    def get_progress(self) -> dict[str, float]:
        return {
            "elapsed_sec": round(self._elapsed_sec(), 3),
            "speed": self._speed,
            "steps": len(self._steps),
            "steps_done": self._steps_done,
        }

    def _elapsed_sec(self) -> float:
        return (self._now() - self._started_at) * self._speed

    def _apply_step(self, step: Step) -> None:
        changes = dict(step.behaviour)
        for name, value in changes.items():
            if name.endswith("_sec") and value is not None:
                changes[name] = value / self._speed
            elif name.startswith("fail_next_"):
                # Add to the remaining count, so that a slow client meets as many failures as the script contains.
                changes[name] = value + self._faults.settings[name]
        self._faults.settings |= changes  # valid, because parse() has checked them
        accounts = dict(step.accounts)
        if count := accounts.pop("add", 0):
            self._accounts.create_sandboxes(count, self._name_prefix)
        self._accounts.disturb_sandboxes(**accounts)
