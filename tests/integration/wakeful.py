"""Runs a reaper that asks for work all the time, whichever one is told of it: `python wakeful.py MODULE`.

RabbitMQ tells the reaper that has come first; a second one would sleep until that is gone.
"""

import runpy
import sys

from reaper.cleanup import CleanUp

work_through = CleanUp._run_once


async def work_through_and_come_back(self: CleanUp) -> float | None:
    await work_through(self)
    return 0.02


CleanUp._run_once = work_through_and_come_back  # type: ignore[method-assign]

run = CleanUp.run


async def run_awake(self: CleanUp) -> None:
    self.wake()
    await run(self)


CleanUp.run = run_awake  # type: ignore[method-assign]

module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
