"""What track routes read from headers, and the rules they must keep.

The functions read the fields themselves; the dependencies below them show FastAPI what there is to document.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Header, Request
from pydantic import WithJsonSchema
from starlette.types import Scope

from gateway.api.errors import ApiError
from sandbox_broker.contract.types import MAX_ID_LENGTH

BLANKS = b" \t"
"""What may surround a header's value. Python's own idea of blanks holds characters that are not ASCII."""

STUDENT = "X-Instruqt-Sandbox-ID"
STUDENT_OLD = "X-Track-ID"
TRACK = "X-Instruqt-Track-ID"
PREFIX = "X-Sandbox-Name-Prefix"
KEY = "Idempotency-Key"
_FIELDS = {name: name.lower().encode() for name in (STUDENT, STUDENT_OLD, TRACK, PREFIX, KEY)}

_PRINTABLE = re.compile(rb"[\x20-\x7e]*")

Fields = Mapping[bytes, bytes]


def fields(scope: Scope) -> Fields:
    """The header fields by their names in lower case. Raises ApiError where one of ours is given twice: which of
    the two is meant, nobody can tell."""
    found = dict(scope["headers"])
    if len(found) != len(scope["headers"]):
        given = [field for field, _ in scope["headers"]]
        for name, field in _FIELDS.items():
            if given.count(field) > 1:
                raise ApiError("INVALID_HEADER", f"{name} was sent more than once. Send it once.")
    return found


def _checked(name: str, given: Fields) -> str | None:
    """The value without blanks around it; None if there is nothing else."""
    value = given.get(_FIELDS[name], b"").strip(BLANKS)
    if not value:
        return None
    if len(value) > MAX_ID_LENGTH:
        raise ApiError("INVALID_HEADER", f"{name} is {len(value)} characters long; {MAX_ID_LENGTH} are allowed.")
    if not _PRINTABLE.fullmatch(value):
        raise ApiError("INVALID_HEADER", f"{name} may hold only printable ASCII characters.")
    return value.decode("ascii")


def holder(scope: Scope, given: Fields) -> str:
    """Who asks: the student's own id."""
    name = STUDENT
    if _FIELDS[STUDENT] not in given and _FIELDS[STUDENT_OLD] in given:
        name = STUDENT_OLD
        scope["state"]["deprecated"] = True  # the middleware says so, on errors too
    found = _checked(name, given)
    if found is None:
        raise ApiError(
            "MISSING_SANDBOX_ID",
            f"Send the student's own id (INSTRUQT_PARTICIPANT_ID) in the header {STUDENT}.",
        )
    return found


def student_as_sent(given: Fields) -> bytes:
    """Return the student id of a request without any check, for the rate limit; empty if there is none.

    It is cut at the longest valid length: an id that every route refuses needs no more memory than a valid one.
    """
    value = given.get(_FIELDS[STUDENT])
    if value is None:
        value = given.get(_FIELDS[STUDENT_OLD], b"")
    return value.strip(BLANKS)[:MAX_ID_LENGTH]


@dataclass(frozen=True, slots=True)
class AllocationHeaders:
    track_name: str | None
    name_prefix: str | None
    idempotency_key: str | None


def allocation(given: Fields) -> AllocationHeaders:
    """What else an allocation may say."""
    return AllocationHeaders(_checked(TRACK, given), _checked(PREFIX, given), _checked(KEY, given))


# What the OpenAPI document says of a value. FastAPI does not check it: that is done above, with errors of our own.
_VALUE = WithJsonSchema({"type": "string", "maxLength": MAX_ID_LENGTH, "pattern": r"^[\x20-\x7e]*$"})
_STUDENT = WithJsonSchema(
    {
        "type": "string",
        "maxLength": MAX_ID_LENGTH,
        "pattern": r"^[\x20-\x7e]*[\x21-\x7e][\x20-\x7e]*$",
        "examples": ["inst-student-1-abc"],
    }
)
_IGNORED_BESIDE_IT = WithJsonSchema({"type": "string"})


async def _holder(
    request: Request,
    _: Annotated[
        Any,
        _STUDENT,
        Header(alias=STUDENT, description="The student's own id (INSTRUQT_PARTICIPANT_ID). Required."),
    ] = None,
    __: Annotated[
        Any,
        _IGNORED_BESIDE_IT,
        Header(
            alias=STUDENT_OLD,
            description=f"The old name of {STUDENT}, read where that is absent.",
            deprecated=True,
        ),
    ] = None,
) -> str:
    return holder(request.scope, fields(request.scope))


async def _allocation(
    request: Request,
    _: Annotated[Any, _VALUE, Header(alias=TRACK, description="The lab's name, kept for analytics.")] = None,
    __: Annotated[
        Any,
        _VALUE,
        Header(alias=PREFIX, description="Only sandboxes whose name starts with exactly this text."),
    ] = None,
    ___: Annotated[
        Any,
        _VALUE,
        Header(alias=KEY, description="The same key from the same student gives the same lease."),
    ] = None,
) -> AllocationHeaders:
    return allocation(fields(request.scope))


Holder = Annotated[str, Depends(_holder)]
Allocation = Annotated[AllocationHeaders, Depends(_allocation)]
