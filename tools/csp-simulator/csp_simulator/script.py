"""A script of faults over time, such as a bad day: what is set when, on a clock that can be made to run faster."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from csp_simulator.accounts import Accounts
from csp_simulator.faults import Faults
from csp_simulator.switches import is_count, is_number, problems

DISTURBANCES = ("add", "drop", "rename", "new_id")

_SCRIPTS = resources.files("csp_simulator").joinpath("scripts")


class ScriptError(Exception):
    """Something in a script is wrong; the message is one line."""


@dataclass(frozen=True, slots=True)
class Step:
    at_sec: float  # since the beginning of the script, on its own clock
    behaviour: Mapping[str, Any]
    accounts: Mapping[str, int]


def shipped() -> list[str]:
    """The names of the scripts that come with the simulator."""
    return sorted(file.name.removesuffix(".json") for file in _SCRIPTS.iterdir() if file.name.endswith(".json"))


def load(name: str) -> list[Step]:
    """Read a script that comes with the simulator; `name` must be one of `shipped`."""
    return parse(json.loads(_SCRIPTS.joinpath(f"{name}.json").read_bytes())["steps"])


def parse(steps: object) -> list[Step]:
    """Check the steps of a script; ScriptError says what is wrong with which."""
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
        raise ScriptError("at_sec must be seconds, and no less than in the step before")
    if not isinstance(behaviour, dict) or not isinstance(accounts, dict):
        raise ScriptError("behaviour and accounts must be objects")
    if wrong := problems(behaviour):
        raise ScriptError("; ".join(wrong))
    return Step(at_sec, behaviour, disturbances(accounts))


def disturbances(given: Mapping[str, object]) -> dict[str, int]:
    """How many accounts are to be added, dropped, renamed or given a new id; ScriptError if that is wrong."""
    counts: dict[str, int] = {}
    for name, count in given.items():
        if name not in DISTURBANCES or not is_count(count):
            raise ScriptError(f"{name} must be one of {', '.join(DISTURBANCES)}, with an integer from 0")
        counts[name] = count
    return counts


class Player:
    """Plays one script at a time.

    It needs no task: whoever looks at the simulator lets it catch up first, so a step is never late.
    """

    def __init__(
        self, faults: Faults, accounts: Accounts, name_prefix: str, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._faults = faults
        self._accounts = accounts
        self._name_prefix = name_prefix
        self._now = now
        self.play([], speed=1)

    def play(self, steps: list[Step], speed: float) -> None:
        """Begin `steps`, in place of what is being played; every duration in them is divided by `speed`."""
        self._steps, self._speed = steps, speed
        self._done, self._began = 0, self._now()
        self.catch_up()

    def stop(self) -> None:
        """Play nothing any more; what has been set stays."""
        self.play([], speed=1)

    def catch_up(self) -> None:
        """Take the steps whose time has come."""
        while self._done < len(self._steps) and self._steps[self._done].at_sec <= self._elapsed_sec():
            self._take(self._steps[self._done])
            self._done += 1

    def progress(self) -> dict[str, float]:
        return {
            "elapsed_sec": round(self._elapsed_sec(), 3),
            "speed": self._speed,
            "steps": len(self._steps),
            "steps_done": self._done,
        }

    def _elapsed_sec(self) -> float:
        return (self._now() - self._began) * self._speed

    def _take(self, step: Step) -> None:
        changes = dict(step.behaviour)
        for name, value in changes.items():
            if name.endswith("_sec") and value is not None:
                changes[name] = value / self._speed
            elif name.startswith("fail_next_"):
                # Added to what is left, so that a script fails as many calls as it says, however slow the client.
                changes[name] = value + self._faults.settings[name]
        self._faults.settings |= changes  # they were checked when the script was parsed
        accounts = dict(step.accounts)
        if added := accounts.pop("add", 0):
            self._accounts.add(added, self._name_prefix)
        self._accounts.disturb(**accounts)
