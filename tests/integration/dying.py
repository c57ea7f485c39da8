"""Runs a service that kills or freezes itself at a named point, once told to: `python dying.py MODULE`.

The file that DIE_AT names tells it the point (see devstack.crashes). The reaper's patience is cut short, so that
what a dead one has claimed is soon free.
"""

import asyncio
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from devstack.crashes import Crashes
from reaper import asking, deletion
from sandbox_broker import bus, csp

DYING_AT = (
    "ClaimDeletions",
    "RecordDeletion",
    "RecordDeletionFailure",
    "BeginListing",
    "StageListing",
    "ApplyListing",
    "RefreshSandboxes",
)

module = sys.argv.pop(1)
crashes = Crashes(Path(os.environ["DIE_AT"]), module)

asking.REQUEST_TIMEOUT_SEC = 1
deletion.CSP_TIMEOUT_SEC = 1

from reaper import cleanup  # noqa: E402 (it reads what was changed)

cleanup.CLAIM_MARGIN_SEC = 0.5
cleanup.NO_REPLY_PAUSE_SEC = 0.2

if module == "reaper":
    client, deleter = csp.CspClient, deletion.Deleter
    client.delete_account = crashes.around(client.delete_account, "before CSP", "after CSP")  # type: ignore[method-assign]
    deleter._record = crashes.around(deleter._record, None, "after the record")  # type: ignore[method-assign]
    cleanup.CleanUp._claim = crashes.around(cleanup.CleanUp._claim, None, "after the claim")  # type: ignore[method-assign]
if module == "allocator":
    from allocator import lanes, listings, store

    lane = lanes.MAINTENANCE.handlers
    for kind, handle in lane.items():
        if kind.__name__ in DYING_AT:
            lane[kind] = crashes.around(handle, f"before {kind.__name__}", f"after {kind.__name__}")  # type: ignore[index]
    one = store.one

    async def one_dying(connection: Any, statement: str, *arguments: Any) -> Any:
        """A statement goes on in the database when who sent it is dead."""
        if statement != listings.APPLY_LISTING:
            return await one(connection, statement, *arguments)
        running = asyncio.create_task(one(connection, statement, *arguments))
        await asyncio.wait([running], timeout=0.001)
        crashes.here("amid ApplyListing")
        result = await running
        crashes.here("between ApplyListing and its flags")
        return result

    store.one = one_dying  # type: ignore[assignment]
    bus.Subscription.ack = crashes.around(bus.Subscription.ack, "before the ack", None)  # type: ignore[method-assign]
if module == "csp_syncer":
    from csp_syncer import asking as syncer_asking
    from csp_syncer import chunking, syncer

    chunking.BATCH_SIZE = 10  # a listing then needs several commands
    request_reply = syncer_asking.request_reply

    async def request_crashing(requester: Any, command: Any, **named: Any) -> Any:
        kind = type(command).__name__
        return await crashes.around(request_reply, f"before {kind}", f"after {kind}")(requester, command, **named)

    syncer.request_reply = request_crashing  # type: ignore[attr-defined]

runpy.run_module(module, run_name="__main__", alter_sys=True)
