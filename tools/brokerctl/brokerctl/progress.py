"""Work that takes a while: the gateway answers when it is done, or with a job to ask after."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.status import Status

from brokerctl.api import TIMEOUT_SEC, Api, Asking
from brokerctl.problems import Problem, Refused, Unavailable
from brokerctl.screens import errors

LOOK_SEC = 1.0

Told = Callable[[], str]
"""How far it is, in a few words."""


def run(api: Api, path: str, *, title: str, told: Told, **parameters: Any) -> dict[str, Any]:
    """What came of it. Raises Problem. A terminal is told meanwhile how it goes."""
    with Progress(title) as progress:
        asking = Asking(lambda: api.post(path, **parameters))
        deadline = time.monotonic() + TIMEOUT_SEC + LOOK_SEC
        while True:
            try:
                answer = asking.answer(LOOK_SEC)
                break
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise Unavailable("The gateway does not answer. It may still do what was asked.") from None
                progress.tell(told)
        if "job_id" not in answer:
            return answer
        while True:
            job = api.get(f"jobs/{answer['job_id']}")
            if job["state"] != "running":
                return _ended(job)
            progress.tell(partial(_steps, job))
            time.sleep(LOOK_SEC)


def _steps(job: dict[str, Any]) -> str:
    return ", ".join(f"{number} {name}" for name, number in job["progress"].items())


def _ended(job: dict[str, Any]) -> dict[str, Any]:
    result: dict[str, Any] = job["result"] or {}
    if job["state"] == "completed":
        return {"status": "completed", **result}
    code = str(result.get("code", "JOB_FAILED"))
    kind = Unavailable if code.endswith("_UNAVAILABLE") else Refused
    raise kind(f"{result.get('message')} ({code}, job {job['job_id']})", detail={**result, "code": code})


class Progress:
    """A line on standard error, where that is a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._since = time.monotonic()
        self._line = Status(title, console=errors)

    def __enter__(self) -> "Progress":
        if errors.is_terminal:
            self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()

    def tell(self, told: Told) -> None:
        if not errors.is_terminal:
            return
        try:
            steps = told()
        except Problem as problem:
            steps = problem.message
        self._line.update(f"{self._title} ({time.monotonic() - self._since:.0f} s): {steps}")
