"""Run a reaper that polls for work every 20 ms: `python polling_reaper.py MODULE`.

RabbitMQ delivers to the reaper that connected first. Without polling, a second reaper would be idle until the first
one disconnects.
"""

import runpy
import sys

from reaper.cleanup import CleanUp

run_once = CleanUp._run_once
run = CleanUp.run


async def run_once_and_repeat(self: CleanUp) -> float | None:
    await run_once(self)
    return 0.02


async def wake_and_run(self: CleanUp) -> None:
    self.wake()
    await run(self)


CleanUp._run_once = run_once_and_repeat  # type: ignore[method-assign]
CleanUp.run = wake_and_run  # type: ignore[method-assign]

module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
