"""Waiting line: serve it, let students join it, and end places."""

import asyncio
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import structlog

from allocator import domain, metrics
from allocator.handlers import access
from allocator.sql import allocations, lease_changes, waiting
from allocator.token_book import Token
from allocator.waiting_estimate import REFRESH_SEC, estimate_waits, expect_sandboxes
from allocator.waiting_line import Place, WaitingLine, assign_sandboxes, retry_after_sec
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import AllocateSandbox, EndPlay, ReplaceSandbox, ServeWaiting
from sandbox_broker.contract.replies import LineServed, Refused, Reply, StudentWaiting

MAX_PASSES = 10
"""Passes over the line per command. A pass is repeated if a chosen sandbox was not leased."""

log = structlog.get_logger()


async def serve_waiting(session: WriteSession, commands: Sequence[ServeWaiting]) -> list[Reply]:
    """End overdue places, and lease the available sandboxes to the line."""
    line = await open_line(session)
    served_before = line.served
    if line.places:
        now = asyncio.get_running_loop().time()
        line.timed_out = {holder: until for holder, until in line.timed_out.items() if until > now}
        # Students cannot repeat their requests while no allocator runs, so time without one does not count.
        may_have_asked = now - line.loaded_at >= line.limits.ttl_sec
        ttl = timedelta(seconds=line.limits.ttl_sec) if may_have_asked else None
        _record_ends(line, await waiting.end_overdue(session, ttl=ttl, asked=list(line.asked_since)))
        await serve_line(session)
    served = line.served - served_before
    return [LineServed(served=served, waiting=len(line.places)) for _ in commands]


async def end_plays(session: WriteSession, commands: Sequence[EndPlay]) -> set[str]:
    """End the places that began before the end of the play. Return their holders."""
    line = await open_line(session)
    ended = {
        command.holder
        for command in commands
        if command.holder in line.places and line.places[command.holder].waiting_since <= command.ended_at
    }
    if ended:
        _record_ends(line, await waiting.leave(session, sorted(ended), "play_ended"))
    return ended


async def open_line(session: WriteSession) -> WaitingLine:
    """Return the line of the session. It is loaded under a new epoch and after a failed change."""
    line = session.waiting_line
    if line.epoch != session.epoch:
        await waiting.load(session)
    return line


async def allocate_in_line(
    session: WriteSession, commands: Sequence[AllocateSandbox]
) -> list[allocations.AllocationRow | None]:
    """Serve the line, and then the commands of students without a place, in this order.

    Return the outcome of each command; None for a waiting student, and for a student outside the line.
    """
    line = session.waiting_line
    results: list[allocations.AllocationRow | None] = []
    for part in domain.split_on_repeated(commands, lambda command: command.holder):
        await _leave_for_another_request(session, part)
        # A student in line for a replacement has a lease, so the allocation returns it and keeps the place.
        waiting_for_lease = {holder for holder, place in line.places.items() if not place.is_replacement}
        repeated = [command for command in part if command.holder in waiting_for_lease]
        new = [command for command in part if command.holder not in waiting_for_lease]
        if (
            not new
            and line.shares_last_look(asyncio.get_running_loop().time())
            and not any(_is_changed(command, line.places[command.holder]) for command in repeated)
        ):
            line.asked_since |= {command.holder: command for command in repeated}
            results += [None] * len(repeated)
            continue
        rows = await serve_line(session, new, repeated)
        results += [rows.get(command.holder) for command in part]
    return results


async def _leave_for_another_request(session: WriteSession, commands: Sequence[AllocateSandbox]) -> None:
    """End the places of requests that were withdrawn or changed their prefix."""
    line = session.waiting_line
    leaving = [
        command.holder
        for command in commands
        if (place := line.places.get(command.holder)) is not None
        and not place.is_replacement
        and (command.wait_sec == 0 or (command.name_prefix or "") != place.prefix)
    ]
    if leaving:
        _record_ends(line, await waiting.leave(session, leaving, "left"))


async def replace_in_line(
    session: WriteSession, command: ReplaceSandbox, scope: str | None
) -> lease_changes.ReplaceRow:
    """Replace the sandbox, after the replacements that have waited for longer."""
    line = await open_line(session)
    place = line.places.get(command.holder or "")
    if place is not None and _refuse_stranger(session, command, place):
        place = None  # the command does not take over the place; the statement decides about it
    if any(place.is_replacement for place in line.places.values()):
        await serve_line(session, repeated=[command] if _waits_for(place, command) else [])
    with line.changing():
        row = await lease_changes.replace(session, command, scope)
    if row["new"]:
        _log_replacement(command, row)
        if (place := line.places.get(row["holder"])) is not None and place.is_replacement:
            _record_served(line, row["holder"], place, row)
    return row


async def wait_for_replacement(
    session: WriteSession, command: ReplaceSandbox, row: lease_changes.ReplaceRow
) -> StudentWaiting | None:
    """Return the place of a student whose sandbox is not replaced yet; None if the student may not wait.

    The student leaves a place that is withdrawn, and one with another purpose than this replacement.
    """
    line, holder = session.waiting_line, row["holder"]
    place = line.places.get(holder)
    if place is not None and _waits_for(place, command) == (command.wait_sec == 0):
        _record_ends(line, await waiting.leave(session, [holder], "left"))
    if not command.wait_sec:
        return None
    if holder not in line.places:
        await session.policies.load(session.connection)
        terms = session.policies.resolve(track_name=row["track_name"], name_prefix=row["name_prefix"])
        wait_sec = min(command.wait_sec, terms.wait_sec)
        if not _can_join(line, holder, wait_sec):
            return None
        student = waiting.Joining(holder, command, row["name_prefix"], row["track_name"], wait_sec)
        await _join(session, [student])
    return (await _describe_places(session, [holder]))[holder]


def _waits_for(place: Place | None, command: ReplaceSandbox) -> bool:
    """Return whether the place is for the replacement of the same sandbox."""
    other = None if place is None else place.command
    return isinstance(other, ReplaceSandbox) and other.sandbox_id == command.sandbox_id


def _log_replacement(command: ReplaceSandbox, row: lease_changes.ReplaceRow) -> None:
    log.warning(
        "sandbox.replaced",
        request_id=command.request_id,
        sandbox_id=command.sandbox_id,
        replaced_by=row["sandbox_id"],
        holder=command.holder,
        reason=command.reason,
    )


async def serve_line(
    session: WriteSession, requests: Sequence[AllocateSandbox] = (), repeated: Sequence[waiting.Request] = ()
) -> dict[str, allocations.AllocationRow]:
    """Lease the available sandboxes to the line, then to `requests`, first come, first served.

    Return the outcome of each request, and of each place that was served, by holder. `repeated` are requests of
    waiting students. They keep their places, except a student who has taken over a lease, or whose idempotency key
    is used by now. No holder occurs twice.
    """
    line = session.waiting_line
    asking: dict[str | None, waiting.Request] = {
        command.holder: command for command in (*line.asked_since.values(), *repeated)
    }
    line.asked_since = {}
    keeping = {
        command.holder: command if _is_changed(command, line.places[command.holder]) else None
        for command in asking.values()
        if command.wait_sec is not None and command.holder is not None
    }
    again = [command for command in asking.values() if isinstance(command, AllocateSandbox)]
    rows: dict[str, allocations.AllocationRow] = {}
    passed_over: set[str] = set()
    for _ in range(MAX_PASSES):
        new = [command for command in requests if command.holder not in rows]
        seekers = [
            *(_Seeker(holder, place.prefix) for holder, place in line.places.items() if holder not in passed_over),
            *(_Seeker(command.holder, command.name_prefix or "", command) for command in new),
        ]
        prefixes = sorted({seeker.prefix for seeker in seekers})
        line.looked_at = asyncio.get_running_loop().time()
        with line.changing():
            available, settled = await waiting.look(
                session, repeated=keeping, requests=[*new, *again], prefixes=prefixes, number=len(seekers)
            )
        for holder, command in keeping.items():
            if command is not None:
                line.places[holder].command = command
        if needless := [command for command in again if command.holder in settled]:
            ends = await waiting.leave(session, [command.holder for command in needless], "refused")
            _record_ends(line, ends)
            requests = [*requests, *needless]
        keeping, again = {}, []
        seekers = [
            seeker
            for seeker in seekers
            if (seeker.holder in line.places if seeker.command is None else seeker.holder not in settled)
        ]
        chosen = assign_sandboxes([seeker.prefix for seeker in seekers], available)
        served = [
            (seeker.command or line.places[seeker.holder].command, sandbox_id)
            for seeker, sandbox_id in zip(seekers, chosen, strict=True)
            if sandbox_id is not None
        ]
        replacing = [command for command, _ in served if isinstance(command, ReplaceSandbox)]
        leasing = [(command, sandbox_id) for command, sandbox_id in served if isinstance(command, AllocateSandbox)]
        are_replaced = [await _replace_for_place(session, command) for command in replacing]
        sandboxes = {command.holder: sandbox_id for command, sandbox_id in leasing}
        are_leased = await _lease_chosen(session, [command for command, _ in leasing], sandboxes, rows, passed_over)
        if are_leased and all(are_replaced):
            break
    rest = [command for command in requests if command.holder not in rows]
    for part in domain.split_on_repeated(rest, lambda _: None) if rest else ():
        outcomes = await allocations.allocate_chosen(session, part, [None] * len(part))
        rows.update((command.holder, row) for command, row in zip(part, outcomes, strict=True))
    return rows


@dataclass(frozen=True, slots=True)
class _Seeker:
    holder: str
    prefix: str
    command: AllocateSandbox | None = None
    """None: the student has a place."""


async def _replace_for_place(session: WriteSession, command: ReplaceSandbox) -> bool:
    """Replace the sandbox of a waiting student. Return False if the place ends, or the chosen sandbox has gone."""
    line = session.waiting_line
    holder, place = next((holder, place) for holder, place in line.places.items() if place.command is command)
    (scope,) = await access.find_scopes(session, [command])
    if isinstance(scope, Refused):
        _record_ends(line, await waiting.leave(session, [holder], "refused"))
        return False
    with line.changing():
        row = await lease_changes.replace(session, command, scope)
    if row["new"]:
        metrics.REPLACED.inc()
        _log_replacement(command, row)
        _record_served(line, holder, place, row)
        return True
    if row["ended"] or not (row["own"] and row["within_limit"]):
        _record_ends(line, await waiting.leave(session, [holder], "refused"))
    return False


async def _lease_chosen(
    session: WriteSession,
    commands: Sequence[AllocateSandbox],
    sandboxes: dict[str, str],
    rows: dict[str, allocations.AllocationRow],
    passed_over: set[str],
) -> bool:
    """Lease the chosen sandboxes, and add the outcomes to `rows`.

    Return whether all were leased. Otherwise a sandbox is left for students behind, or another lane took one.
    """
    line = session.waiting_line
    is_complete = True
    for part in domain.split_on_repeated(commands, lambda command: command.idempotency_key) if commands else ():
        with line.changing():
            outcomes = await allocations.allocate_chosen(
                session, part, [sandboxes[command.holder] for command in part]
            )
        refused: list[str] = []
        for command, row in zip(part, outcomes, strict=True):
            if row["outcome"] == "exhausted":
                # A chosen sandbox is no longer available, so the statement leased none.
                return False
            is_complete &= row["outcome"] == "new"
            place = line.places.get(command.holder)
            if place is None or row["outcome"] == "new":
                rows[command.holder] = row
            if place is None:
                continue
            if row["outcome"] == "new":
                _record_served(line, command.holder, place, row)
            elif row["outcome"] in allocations.QUOTA_OUTCOMES:
                passed_over.add(command.holder)
            else:
                refused.append(command.holder)
        if refused:
            _record_ends(line, await waiting.leave(session, refused, "refused"))
    return is_complete


async def find_refused(
    session: WriteSession, commands: Mapping[domain.DedupKey, AllocateSandbox]
) -> dict[domain.DedupKey, allocations.AllocationRow]:
    """Return the refused outcome of each command that must not change a place in the line.

    An allocation never changes a place for a replacement. The lease of the student decides about it.
    """
    places = session.waiting_line.places
    repeated = {
        key: (command, place)
        for key, command in commands.items()
        if (place := places.get(command.holder)) is not None and not place.is_replacement
    }
    if any(_find_token_name(command) for command, _ in repeated.values()):
        # The statements that keep a place do not check the token.
        await access.load_current_tokens(session)
    outcomes: dict[domain.DedupKey, allocations.AllocationRow] = {}
    for key, (command, place) in repeated.items():
        token = session.policies.tokens.judge(command)
        outcome = token if isinstance(token, str) else _refuse_stranger(session, command, place)
        if outcome is not None:
            outcomes[key] = allocations.build_refusal(0, outcome)
    return outcomes


def _refuse_stranger(
    session: WriteSession, command: waiting.Request, place: Place
) -> Literal["wrong_secret", "out_of_scope"] | None:
    """Return the refused outcome of a command for a place that its sender may not reach: the place was taken with
    another token than the sender's, which is limited to its own, or with another secret."""
    token = session.policies.tokens.find(command.sender)
    if isinstance(token, Token) and token.is_scoped and token.name != _find_token_name(place.command):
        return "out_of_scope"
    secret_hash = place.command.secret_hash
    if secret_hash is not None and not hmac.compare_digest(secret_hash, command.secret_hash or ""):
        return "wrong_secret"
    return None


def _find_token_name(command: waiting.Request) -> str | None:
    """Return the name of the named token, or None. A new token with the name of a revoked one reaches its places,
    as it reaches its leases."""
    sender = command.sender
    return None if sender is None or sender.key_id is None else sender.actor


def _is_changed(command: waiting.Request, place: Place) -> bool:
    """Return whether the student sent another request for the same place, for example with another key."""
    ignored = {"request_id": "", "traceparent": None, "wait_sec": None, "sender": None}
    return _key_id(command) != _key_id(place.command) or (
        command.model_copy(update=ignored) != place.command.model_copy(update=ignored)
    )


def _key_id(command: waiting.Request) -> str | None:
    return None if command.sender is None else command.sender.key_id


async def wait_in_line(
    session: WriteSession, commands: Sequence[AllocateSandbox]
) -> dict[domain.DedupKey, StudentWaiting]:
    """Let students without a sandbox join the line, in this order, unless they wait already.

    Return the reply to each command of a waiting student. The others must not wait: the line is full, their policy
    does not allow it, or their longest wait is over.
    """
    line = session.waiting_line
    joining: dict[str, waiting.Joining] = {}
    for command in commands:
        terms = session.policies.resolve(track_name=command.track_name, name_prefix=command.name_prefix)
        wait_sec = min(command.wait_sec or 0, terms.wait_sec)
        if _can_join(line, command.holder, wait_sec, others=len(joining)):
            student = waiting.Joining(command.holder, command, command.name_prefix, command.track_name, wait_sec)
            joining.setdefault(command.holder, student)
    if joining:
        await _join(session, list(joining.values()))
    places = await _describe_places(session, [command.holder for command in commands])
    return {domain.dedup_key(command): places[command.holder] for command in commands if command.holder in places}


def _can_join(line: WaitingLine, holder: str, wait_sec: float, *, others: int = 0) -> bool:
    """Return whether the student may join after `others`. After the longest wait, one request may not."""
    is_over = line.timed_out.pop(holder, None) is not None
    has_room = len(line.places) + others < line.limits.max_places
    return wait_sec > 0 and holder not in line.places and has_room and not is_over


async def _join(session: WriteSession, students: Sequence[waiting.Joining]) -> None:
    line = session.waiting_line
    await waiting.join(session, students)
    metrics.WAITING_STARTED.inc(len(students))
    positions = line.positions(student.holder for student in students)
    for student in students:
        log.info(
            "waiting.started",
            request_id=student.command.request_id,
            holder=student.holder,
            name_prefix=student.name_prefix,
            position=positions[student.holder],
        )


async def _describe_places(session: WriteSession, holders: Sequence[str]) -> dict[str, StudentWaiting]:
    """Return the reply to each of the holders that waits."""
    line = session.waiting_line
    positions = line.positions(holder for holder in holders if holder in line.places)
    estimates = await _estimate_waits(session) if positions else {}
    return {
        holder: StudentWaiting(
            position=position,
            waiting_since=line.places[holder].waiting_since,
            estimated_wait_sec=estimates.get(holder),
            retry_after=retry_after_sec(position, line.limits.ttl_sec),
        )
        for holder, position in positions.items()
    }


async def _estimate_waits(session: WriteSession) -> dict[str, int | None]:
    """Return the estimated wait of each holder in the line, in seconds. Creations are read once per REFRESH_SEC."""
    line = session.waiting_line
    now = asyncio.get_running_loop().time()
    if now - line.expected_at >= REFRESH_SEC:
        line.expected = expect_sandboxes(await waiting.load_coming(session))
        line.expected_at = now
    prefixes = [place.prefix for place in line.places.values()]
    return dict(zip(line.places, estimate_waits(prefixes, line.expected), strict=True))


def _record_served(
    line: WaitingLine, holder: str, place: Place, row: allocations.AllocationRow | lease_changes.ReplaceRow
) -> None:
    line.remove([holder])
    line.served += 1
    waited_sec = max(0, row["allocated_at"] - place.waiting_since)
    metrics.WAITING_TIME.observe(waited_sec)
    log.info(
        "waiting.served",
        request_id=place.command.request_id,
        holder=holder,
        sandbox_id=row["sandbox_id"],
        waited_sec=waited_sec,
    )


def _record_ends(line: WaitingLine, ended: Sequence[waiting.EndedRow]) -> None:
    for row in ended:
        metrics.WAITING_ENDED.labels(reason=row["reason"]).inc()
        log.info("waiting.ended", holder=row["holder"], reason=row["reason"])
        if row["reason"] == "timed_out" and row["holder"] is not None:
            line.timed_out[row["holder"]] = asyncio.get_running_loop().time() + line.limits.ttl_sec
