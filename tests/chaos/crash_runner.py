"""Runner of a service that kills or freezes itself at a point of crash_points.py: `python crash_runner.py MODULE`.

The file in CRASH_AT contains the point (see devstack.crashes). The reaper and the provisioner run with shorter
time-outs, so that the claims of a killed one end soon.
"""

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from devstack.crashes import CrashPoints

module = sys.argv.pop(1)
crashes = CrashPoints(Path(os.environ["CRASH_AT"]), module)

if module == "gateway":
    from gateway import allocator_client
    from sandbox_broker.messaging import rpc_client

    rpc_client.RpcClient.send = crashes.wrap(rpc_client.RpcClient.send, "before sending", "after sending")  # type: ignore[method-assign]
    rpc = allocator_client.AllocatorClient
    rpc.request = crashes.wrap(rpc.request, None, "before answering")  # type: ignore[method-assign]
if module == "allocator":
    from allocator import consumer
    from allocator.sql import allocations, lease_changes, leases
    from sandbox_broker.contract import topology
    from sandbox_broker.messaging import subscription

    # Each function runs one statement, which commits at its end.
    commit = ("before a student's commit", "after a student's commit")
    allocations.allocate = crashes.wrap(allocations.allocate, *commit)
    leases.release = crashes.wrap(leases.release, *commit)
    leases.end_plays = crashes.wrap(leases.end_plays, *commit)
    lease_changes.claim = crashes.wrap(lease_changes.claim, *commit)
    lease_changes.extend = crashes.wrap(lease_changes.extend, *commit)
    lease_changes.replace = crashes.wrap(lease_changes.replace, *commit)

    # Crash only at messages of students, because maintenance replies and acknowledges continuously.
    students = topology.ALLOCATOR_COMMANDS.name
    answer, ack = consumer.publish_replies, subscription.Subscription.ack  # type: ignore[attr-defined]
    crashing_answer = crashes.wrap(answer, None, "after a student's reply")
    crashing_ack = crashes.wrap(ack, "before a student's ack", None)

    async def answer_student(publisher: Any, delivery: Any, replies: Any) -> None:
        await (crashing_answer if delivery.routing_key == students else answer)(publisher, delivery, replies)

    async def ack_student(subscription: Any, delivery: Any, *, all_before: bool = False) -> None:
        # Expired messages are acknowledged one by one, answered batches with all_before.
        is_answered = all_before and subscription._queue == students
        await (crashing_ack if is_answered else ack)(subscription, delivery, all_before=all_before)

    consumer.publish_replies = answer_student  # type: ignore[attr-defined]
    subscription.Subscription.ack = ack_student  # type: ignore[method-assign, assignment]
if module == "reaper":
    from reaper import deletion
    from sandbox_broker.csp import client as csp_client

    deletion.CSP_TIMEOUT_SEC = 5

    from reaper import cleanup, main

    main.REQUEST_TIMEOUT_SEC = 3
    cleanup.CLAIM_MARGIN_SEC = 2
    client, deleter = csp_client.CspClient, deletion.Deleter
    client.delete_account = crashes.wrap(client.delete_account, "before CSP", "after CSP")  # type: ignore[method-assign]
    deleter._record = crashes.wrap(deleter._record, None, "after the record")  # type: ignore[method-assign]
    cleanup.CleanUp._claim = crashes.wrap(cleanup.CleanUp._claim, None, "after the claim")  # type: ignore[method-assign]
if module == "provisioner":
    from provisioner import creation

    creation.LOOK_UP_TIMEOUT_SEC = 3

    from provisioner import main as provisioner_main
    from provisioner import refill
    from sandbox_broker.csp import client as csp_client

    provisioner_main.REQUEST_TIMEOUT_SEC = 3
    refill.CLAIM_MARGIN_SEC = 2
    client, creator = csp_client.CspClient, creation.Creator
    create_account = crashes.wrap_call(client.create_account, "during CSP")
    creator.create = crashes.wrap(creator.create, "after the claim", None)  # type: ignore[method-assign]
    client.create_account = crashes.wrap(create_account, "before CSP", "after CSP")  # type: ignore[method-assign]
    client.find_account_by_name = crashes.wrap(client.find_account_by_name, None, "after the look-up")  # type: ignore[method-assign]
    creator._record = crashes.wrap(creator._record, None, "after the record")  # type: ignore[method-assign]
if module == "csp_syncer":
    from sandbox_broker.messaging import maintenance_client

    request = maintenance_client.MaintenanceClient.request

    async def request_and_crash(client: Any, command: Any, **options: Any) -> Any:
        name = type(command).__name__
        return await crashes.wrap(request, f"before {name}", f"after {name}")(client, command, **options)

    maintenance_client.MaintenanceClient.request = request_and_crash  # type: ignore[assignment]

runpy.run_module(module, run_name="__main__", alter_sys=True)
