"""Run a service that kills or freezes itself at a given point: `python crash_runner.py MODULE`.

The file named by DIE_AT holds the point (see devstack.crashes). The time-outs of the reaper and the provisioner are
shortened, so that the claims of a killed one expire soon. The modules of the service may be imported already.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from devstack.crashes import CrashPoints
from reaper import cleanup, deletion, main
from sandbox_broker.csp import client as csp_client
from sandbox_broker.messaging import subscription

CRASH_COMMANDS = (
    "ClaimDeletions",
    "RecordDeletion",
    "RecordDeletionFailure",
    "BeginListing",
    "StageListing",
    "ApplyListing",
    "RefreshSandboxes",
    "ClaimCreations",
    "RecordCreation",
    "RecordCreationFailure",
    "EndCreations",
    "ClaimAccess",
    "RecordAccess",
    "RecordAccessFailure",
    "RecordAccessRemoval",
    "ClaimLease",
    "ExtendLease",
    "ReplaceSandbox",
    "EndPlay",
)

module = sys.argv.pop(1)
crashes = CrashPoints(Path(os.environ["DIE_AT"]), module)

deletion.CSP_TIMEOUT_SEC = main.CSP_TIMEOUT_SEC = 1  # type: ignore[attr-defined]
main.REQUEST_TIMEOUT_SEC = 0.5
cleanup.CLAIM_MARGIN_SEC = 0.3
cleanup.NO_REPLY_PAUSE_SEC = 0.2

if module == "reaper":
    client, deleter = csp_client.CspClient, deletion.Deleter
    client.delete_account = crashes.wrap(client.delete_account, "before CSP", "after CSP")  # type: ignore[method-assign]
    deleter._record = crashes.wrap(deleter._record, None, "after the record")  # type: ignore[method-assign]
    cleanup.CleanUp._claim = crashes.wrap(cleanup.CleanUp._claim, None, "after the claim")  # type: ignore[method-assign]
if module == "provisioner":
    from provisioner import access, access_runs, creation, refill, syncs, throttle
    from provisioner import main as provisioner_main
    from sandbox_broker.csp.sessions import SessionClient
    from sandbox_broker.csp.users import UserClient

    creation.LOOK_UP_TIMEOUT_SEC = provisioner_main.LOOK_UP_TIMEOUT_SEC = 1  # type: ignore[attr-defined]
    provisioner_main.REQUEST_TIMEOUT_SEC = 0.5
    refill.CLAIM_MARGIN_SEC = 0.3
    refill.MIN_PAUSE_SEC = 0.1
    refill.NO_REPLY_PAUSE_SEC = 0.2
    throttle.WINDOW_SEC = 1
    access.RETRY_SEC = 0.2
    access_runs.CLAIM_TIMEOUT_SEC = 0.5
    access_runs.CLAIM_MARGIN_SEC = 0.3
    access_runs.NO_REPLY_PAUSE_SEC = 0.2
    client, creator, requests = csp_client.CspClient, creation.Creator, syncs.SyncRequests
    create_account = crashes.wrap_call(client.create_account, "during CSP")
    creator.create = crashes.wrap(creator.create, "after the claim", None)  # type: ignore[method-assign]
    client.create_account = crashes.wrap(create_account, "before CSP", "after CSP")  # type: ignore[method-assign]
    client.find_account_by_name = crashes.wrap(client.find_account_by_name, None, "after the look-up")  # type: ignore[method-assign]
    creator._record = crashes.wrap(creator._record, None, "after the record")  # type: ignore[method-assign]
    requests._request = crashes.wrap(requests._request, None, "after the request of a sync")  # type: ignore[method-assign]
    steps: dict[str, tuple[type[Any], str]] = {
        "the sign-in": (SessionClient, "sign_in"),
        "the account switch": (SessionClient, "switch"),
        "the current user": (SessionClient, "require_current_account"),
        "the groups": (UserClient, "list_groups"),
        "the creation of the user": (UserClient, "create_user"),
        "the password": (UserClient, "set_password"),
        "the deletion of the user": (UserClient, "delete_user"),
    }
    for step, (owner, method) in steps.items():
        call = crashes.wrap_call(getattr(owner, method), f"during {step}")
        setattr(owner, method, crashes.wrap(call, f"before {step}", f"after {step}"))
    worker, runs = access.AccessWorker, access_runs.AccessRuns
    worker.carry_out = crashes.wrap(worker.carry_out, None, "before the record of a login")  # type: ignore[method-assign]
    runs._record_and_claim = crashes.wrap(runs._record_and_claim, None, "after the records and the claim")  # type: ignore[method-assign]
if module == "allocator":
    from allocator import routing
    from allocator.sql import creations, listings

    for lane in (routing.STUDENTS, routing.MAINTENANCE):
        for command_type, handle in lane.handlers.items():
            name = command_type.__name__
            if name in CRASH_COMMANDS:
                lane.handlers[command_type] = crashes.wrap(handle, f"before {name}", f"after {name}")  # type: ignore[index]
    # PostgreSQL completes the statement after the death of the allocator.
    apply_listing = crashes.wrap_call(listings.apply_listing, "during ApplyListing")
    listings.apply_listing = crashes.wrap(apply_listing, None, "between ApplyListing and its flags")
    creations.grant_creations = crashes.wrap(creations.grant_creations, None, "between the grant and the claim")
    subscription.Subscription.ack = crashes.wrap(subscription.Subscription.ack, "before the ack", None)  # type: ignore[method-assign]
if module == "csp_syncer":
    from csp_syncer import chunking
    from sandbox_broker.messaging import maintenance_client

    chunking.BATCH_SIZE = 10  # a small listing then needs several commands
    request = maintenance_client.MaintenanceClient.request

    async def request_and_crash(client: Any, command: Any, **options: Any) -> Any:
        name = type(command).__name__
        return await crashes.wrap(request, f"before {name}", f"after {name}")(client, command, **options)

    maintenance_client.MaintenanceClient.request = request_and_crash  # type: ignore[assignment]

runpy.run_module(module, run_name="__main__", alter_sys=True)
