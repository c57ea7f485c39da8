"""Runs a service whose wall clock is an hour ahead: `python wrong_clock.py MODULE`."""

import datetime
import runpy
import sys
import time
from typing import Self

WRONG_BY_SEC = 3600

right_time = time.time


class WrongDatetime(datetime.datetime):
    @classmethod
    def now(cls, tz: datetime.tzinfo | None = None) -> Self:
        return cls.fromtimestamp(right_time() + WRONG_BY_SEC, tz)


time.time = lambda: right_time() + WRONG_BY_SEC
datetime.datetime = WrongDatetime  # type: ignore[misc]

module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
