"""Run a service with a wall clock that is an hour ahead: `python wrong_clock.py MODULE`."""

import datetime
import runpy
import sys
import time
from typing import Self

OFFSET_SEC = 3600

correct_time = time.time


class WrongDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Self:
        return cls.fromtimestamp(correct_time() + OFFSET_SEC, tz)


time.time = lambda: correct_time() + OFFSET_SEC
datetime.datetime = WrongDatetime  # type: ignore[misc]

module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
