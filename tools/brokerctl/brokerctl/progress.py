"""Long-running admin requests. The gateway answers with the result, or with the id of a job to poll."""

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from rich.status import Status

from brokerctl.answers import Job, JobAnswer
from brokerctl.client import TIMEOUT_SEC, AdminClient, BackgroundCall
from brokerctl.errors import CommandError, Refused, Unavailable
from brokerctl.output import error_console, printable_text

POLL_INTERVAL_SEC = 1.0

DescribeProgress = Callable[[], str]


def run_job(
    client: AdminClient, path: str, *, title: str, describe: DescribeProgress, **parameters: Any
) -> Mapping[str, Any]:
    """Send POST `path`, wait for the end of the work and return its result. Raises `CommandError`.

    A terminal shows `describe()` until the gateway answers, then the progress of the job.
    """
    with ProgressLine(title) as progress:
        call = BackgroundCall(lambda: client.post(path, JobAnswer, **parameters))
        deadline = time.monotonic() + TIMEOUT_SEC + POLL_INTERVAL_SEC
        while True:
            try:
                answer = call.result(POLL_INTERVAL_SEC)
                break
            except TimeoutError:
                if time.monotonic() > deadline:
                    raise Unavailable("The gateway does not answer. It may still complete the request.") from None
                progress.update(describe)
        if "job_id" not in answer:
            return answer
        while True:
            job = client.get(f"jobs/{answer['job_id']}", Job)
            if job["state"] != "running":
                return _read_job_result(job)
            progress.update(partial(_format_job_progress, job))
            time.sleep(POLL_INTERVAL_SEC)


def _format_job_progress(job: Job) -> str:
    return ", ".join(f"{count} {name}" for name, count in job["progress"].items())


def _read_job_result(job: Job) -> dict[str, Any]:
    result = job["result"] or {}
    if job["state"] == "completed":
        return {"status": "completed", **result}
    code = str(result.get("code", "JOB_FAILED"))
    error_class = Unavailable if code.endswith("_UNAVAILABLE") else Refused
    raise error_class(f"{result.get('message')} ({code}, job {job['job_id']})", detail={**result, "code": code})


class ProgressLine:
    """Progress line on standard error. It prints only if standard error is a terminal."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._started_at = time.monotonic()
        self._line = Status(title, console=error_console)

    def __enter__(self) -> "ProgressLine":
        if error_console.is_terminal:
            self._line.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._line.stop()

    def update(self, describe: DescribeProgress) -> None:
        if not error_console.is_terminal:
            return
        try:
            progress = describe()
        except CommandError as error:
            progress = error.message
        # As Text, because rich reads markup in a plain string.
        line = f"{self._title} ({time.monotonic() - self._started_at:.0f} s): {progress}"
        self._line.update(printable_text(line))
