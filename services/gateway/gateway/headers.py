"""What track routes read from headers, and the rules they must keep."""

import re
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header, Request

from gateway.errors import ApiError
from sandbox_broker.messages import MAX_ID_LENGTH

BLANKS = " \t"
"""What may surround a header's value. Python's own idea of blanks holds characters that are not ASCII."""

_PRINTABLE = re.compile(r"[\x20-\x7e]*")


def _checked(name: str, value: str | None) -> str | None:
    """The value without blanks around it; None if there is nothing else."""
    value = (value or "").strip(BLANKS)
    if not value:
        return None
    if len(value) > MAX_ID_LENGTH:
        raise ApiError("INVALID_HEADER", f"{name} is {len(value)} characters long; {MAX_ID_LENGTH} are allowed.")
    if not _PRINTABLE.fullmatch(value):
        raise ApiError("INVALID_HEADER", f"{name} may hold only printable ASCII characters.")
    return value


async def _holder(
    request: Request,
    x_instruqt_sandbox_id: Annotated[
        str | None,
        Header(
            alias="X-Instruqt-Sandbox-ID",
            description="The student's own id (INSTRUQT_PARTICIPANT_ID). Required.",
        ),
    ] = None,
    x_track_id: Annotated[
        str | None,
        Header(
            alias="X-Track-ID",
            description="The old name of X-Instruqt-Sandbox-ID, read where that is absent.",
            deprecated=True,
        ),
    ] = None,
) -> str:
    if x_instruqt_sandbox_id is None and x_track_id is not None:
        request.state.deprecated = True  # the middleware says so, on errors too
        holder = _checked("X-Track-ID", x_track_id)
    else:
        holder = _checked("X-Instruqt-Sandbox-ID", x_instruqt_sandbox_id)
    if holder is None:
        raise ApiError(
            "MISSING_SANDBOX_ID",
            "Send the student's own id (INSTRUQT_PARTICIPANT_ID) in the header X-Instruqt-Sandbox-ID.",
        )
    return holder


Holder = Annotated[str, Depends(_holder)]


@dataclass(frozen=True, slots=True)
class AllocationHeaders:
    track_name: str | None
    name_prefix: str | None
    idempotency_key: str | None


async def _allocation_headers(
    x_instruqt_track_id: Annotated[
        str | None, Header(alias="X-Instruqt-Track-ID", description="The lab's name, kept for analytics.")
    ] = None,
    x_sandbox_name_prefix: Annotated[
        str | None,
        Header(
            alias="X-Sandbox-Name-Prefix",
            description="Only sandboxes whose name starts with exactly this text.",
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        Header(alias="Idempotency-Key", description="The same key from the same student gives the same lease."),
    ] = None,
) -> AllocationHeaders:
    return AllocationHeaders(
        track_name=_checked("X-Instruqt-Track-ID", x_instruqt_track_id),
        name_prefix=_checked("X-Sandbox-Name-Prefix", x_sandbox_name_prefix),
        idempotency_key=_checked("Idempotency-Key", idempotency_key),
    )


Allocation = Annotated[AllocationHeaders, Depends(_allocation_headers)]
