"""Runs a service that kills or freezes itself at a point of crash_points.py: `python crashing.py MODULE`.

The file that CRASH_AT names tells it the point (see devstack.crashes). The reaper's patience is cut short, so that
what a dead one has claimed is soon free.
"""

import os
import runpy
import sys
from pathlib import Path

from devstack.crashes import Crashes

module = sys.argv.pop(1)
crashes = Crashes(Path(os.environ["CRASH_AT"]), module)

if module == "allocator":
    from allocator import consumer, store
    from sandbox_broker import bus

    # Each is one statement, and its end is the commit.
    store.allocate = crashes.around(store.allocate, "before commit", "after commit")
    store.release = crashes.around(store.release, "before commit", "after commit")
    consumer.answer = crashes.around(consumer.answer, None, "after reply")  # type: ignore[attr-defined]
    bus.Subscription.ack = crashes.around(bus.Subscription.ack, "before ack", None)  # type: ignore[method-assign]
if module == "reaper":
    from reaper import asking, deletion
    from sandbox_broker import csp

    asking.REQUEST_TIMEOUT_SEC = 3
    deletion.CSP_TIMEOUT_SEC = 5

    from reaper import cleanup

    cleanup.CLAIM_MARGIN_SEC = 2
    client = csp.CspClient
    client.delete_account = crashes.around(client.delete_account, "before CSP", "after CSP")  # type: ignore[method-assign]

runpy.run_module(module, run_name="__main__", alter_sys=True)
