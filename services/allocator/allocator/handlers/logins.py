"""Logins inside sandboxes: claim the due ones, record their results, encrypt their passwords with another key."""

import json
from datetime import timedelta

import structlog

from allocator import metrics
from allocator.access_password import generate_password
from allocator.sql import logins
from allocator.write_session import WriteSession
from sandbox_broker.contract import replies
from sandbox_broker.contract.commands import (
    ClaimAccess,
    RecordAccess,
    RecordAccessFailure,
    RecordAccessRemoval,
    RotateAccessKeys,
)
from sandbox_broker.contract.replies import Reply, refuse
from sandbox_broker.runtime.access_keys import UnknownKey

log = structlog.get_logger()


async def claim_access(session: WriteSession, command: ClaimAccess) -> Reply:
    if (keys := session.access_keys) is None:
        return refuse("ACCESS_NOT_CONFIGURED")
    rows = await logins.claim(
        session,
        duration=timedelta(seconds=command.claim_sec),
        max_running=command.max_running,
        email_domain=command.email_domain,
        removal_wait=timedelta(seconds=command.removal_wait_sec),
        passwords=[keys.encrypt(generate_password()) for _ in range(command.limit)],
        key_id=keys.key_id,
    )
    claimed = tuple(
        replies.DueAccess(
            sandbox_id=row["sandbox_id"],
            external_id=row["external_id"],
            claim_id=row["claim"],
            remove=row["remove"],
            email=row["email"],
            groups=json.loads(row["groups"]),
            password=row["password"],
            user_id=row["user_id"],
            attempts=row["attempts"],
            waiting_sec=row["waiting_sec"],
        )
        for row in rows
        if row["sandbox_id"] is not None
    )
    return replies.AccessClaimed(logins=claimed, next_in_sec=None if claimed else rows[0]["next_in_sec"])


async def record_access(session: WriteSession, command: RecordAccess) -> Reply:
    row = await logins.record(
        session, sandbox_id=command.sandbox_id, claim_id=command.claim_id, user_id=command.user_id
    )
    if row["state"] == "ready":
        metrics.ACCESS_READY.observe(row["after_sec"])
        log.info("access.ready", sandbox_id=command.sandbox_id, after_sec=round(row["after_sec"], 1))
    return replies.Recorded(changed=row["state"] is not None)


async def record_access_failure(session: WriteSession, command: RecordAccessFailure) -> Reply:
    row = await logins.record_failure(
        session,
        sandbox_id=command.sandbox_id,
        claim_id=command.claim_id,
        error=command.error,
        retry_in=timedelta(seconds=command.retry_in_sec),
        failed=command.failed,
    )
    if row["state"] is not None:
        log.warning(
            "access.failed" if row["has_failed"] else "access.postponed",
            sandbox_id=command.sandbox_id,
            attempts=row["attempts"],
            error=command.error,
            retry_in_sec=round(command.retry_in_sec, 1),
        )
    return replies.Recorded(changed=row["state"] is not None)


async def record_access_removal(session: WriteSession, command: RecordAccessRemoval) -> Reply:
    changed = await logins.record_removal(session, sandbox_id=command.sandbox_id, claim_id=command.claim_id)
    if changed:
        log.info("access.removed", sandbox_id=command.sandbox_id)
    return replies.Recorded(changed=changed)


async def rotate_access_keys(session: WriteSession, command: RotateAccessKeys) -> Reply:
    if (keys := session.access_keys) is None:
        return refuse("ACCESS_NOT_CONFIGURED")
    rotated: list[tuple[logins.OutdatedPassword, str]] = []
    unreadable, after = 0, ""
    while outdated := await logins.find_outdated_passwords(
        session, key_id=keys.key_id, after=after, limit=command.limit
    ):
        for password in outdated:
            try:
                rotated.append((password, keys.rotate(password.password)))
            except UnknownKey:
                unreadable += 1
                log.error("access.key_unknown", sandbox_id=password.sandbox_id)
        after = outdated[-1].sandbox_id
        if rotated:
            break
    number, remaining = await logins.replace_passwords(session, key_id=keys.key_id, passwords=rotated)
    log.info("access.keys_rotated", rotated=number, remaining=remaining, unreadable=unreadable)
    return replies.AccessKeysRotated(rotated=number, remaining=remaining, unreadable=unreadable)
