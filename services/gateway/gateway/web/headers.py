"""Request headers of the track routes, and their validation.

The `read_…` functions validate. The dependencies at the end describe the same headers for the OpenAPI document.
"""

import hashlib
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import Depends, Header, Request
from pydantic import WithJsonSchema
from starlette.types import Scope

from gateway.api.errors import ApiError
from sandbox_broker.contract.types import MAX_ID_LENGTH, MAX_SEC, PSEUDONYM_PREFIX, LeaseMode

BLANKS = b" \t"
"""Characters that may surround the value of a header. `bytes.strip()` without arguments removes others too."""

STUDENT = "X-Instruqt-Sandbox-ID"
STUDENT_OLD = "X-Track-ID"
TRACK = "X-Instruqt-Track-ID"
PREFIX = "X-Sandbox-Name-Prefix"
KEY = "Idempotency-Key"
MODE = "X-Lease-Mode"
NEW_HOLDER = "X-New-Holder"
SECRET = "X-Lease-Secret"  # noqa: S105 (the name of the header)
ACCESS = "X-Sandbox-Access"
PREFER = "Prefer"
_PREFER_FIELD = PREFER.lower().encode()
_FIELDS = {
    name: name.lower().encode()
    for name in (STUDENT, STUDENT_OLD, TRACK, PREFIX, KEY, MODE, NEW_HOLDER, SECRET, ACCESS)
}

# RFC 7240: commas separate preferences, and may stand inside quotes.
_PREFERENCE = re.compile(rb'(?:[^,"]|"(?:[^"\\]|\\.)*"?)+')
_WAIT = re.compile(rb'("?)(?P<seconds>[0-9]{1,18})\1')
WAIT_APPLIED = "respond-async"
"""Value of the response header Preference-Applied for a student in the waiting line."""

MIN_SECRET_LENGTH = 16

_PRINTABLE = re.compile(rb"[\x20-\x7e]*")
_UNPRINTABLE = re.compile(rb"[^\x20-\x7e]")

Fields = Mapping[bytes, bytes]


def read_fields(scope: Scope) -> Fields:
    """Return the header fields by their lower-case names. Raises the errors of `refuse_repeated`."""
    fields = dict(scope["headers"])
    refuse_repeated(scope, fields)
    return fields


def refuse_repeated(scope: Scope, fields: Fields) -> None:
    """Raise ApiError INVALID_HEADER for a repeated header of this module, because its meaning is ambiguous."""
    if len(fields) != len(scope["headers"]):
        names = [field for field, _ in scope["headers"]]
        for name, field in _FIELDS.items():
            if names.count(field) > 1:
                raise ApiError("INVALID_HEADER", f"{name} was sent more than once. Send it once.")


def _read_value(name: str, fields: Fields) -> str | None:
    """Return the value without surrounding blanks; None for a missing or blank header."""
    value = fields.get(_FIELDS[name], b"").strip(BLANKS)
    if not value:
        return None
    if len(value) > MAX_ID_LENGTH:
        raise ApiError("INVALID_HEADER", f"{name} has {len(value)} characters. Send at most {MAX_ID_LENGTH}.")
    if not _PRINTABLE.fullmatch(value):
        raise ApiError("INVALID_HEADER", f"{name} contains other characters than printable ASCII. Remove them.")
    return value.decode("ascii")


def _read_student(name: str, fields: Fields) -> str | None:
    """Like `_read_value`, for a student id. Raises ApiError INVALID_HEADER for the beginning of pseudonyms."""
    student = _read_value(name, fields)
    if student is not None and student.startswith(PSEUDONYM_PREFIX):
        raise ApiError(
            "INVALID_HEADER", f"{name} begins with the reserved word {PSEUDONYM_PREFIX}. Use another id."
        )
    return student


def read_holder(scope: Scope, fields: Fields) -> str:
    """Return the student's own id. Raises ApiError MISSING_SANDBOX_ID or INVALID_HEADER."""
    name = STUDENT
    if _FIELDS[STUDENT] not in fields and _FIELDS[STUDENT_OLD] in fields:
        name = STUDENT_OLD
        scope["state"]["deprecated"] = True  # the middleware adds the Deprecation header, also to errors
    holder = _read_student(name, fields)
    if holder is None:
        raise ApiError(
            "MISSING_SANDBOX_ID",
            f"The header {STUDENT} is missing or blank. Send the student's own id (INSTRUQT_PARTICIPANT_ID) in it.",
        )
    return holder


def read_unchecked_holder(fields: Fields) -> bytes:
    """Return the student's id without validation, for the rate limit, or an empty value.

    The result is cut at the longest valid length, so that an invalid id takes no more memory than a valid one.
    """
    value = fields.get(_FIELDS[STUDENT])
    if value is None:
        value = fields.get(_FIELDS[STUDENT_OLD], b"")
    return value.strip(BLANKS)[:MAX_ID_LENGTH]


def read_claimed_track(fields: Fields) -> str:
    """Return the lab name for the log of a request without a known token, or an empty value.

    A client without a token sends any text, so the result is cut at the longest valid length, and every character
    other than printable ASCII becomes `?`.
    """
    value = fields.get(_FIELDS[TRACK], b"").strip(BLANKS)[:MAX_ID_LENGTH]
    return _UNPRINTABLE.sub(b"?", value).decode("ascii")


def read_wait_sec(scope: Scope, fields: Fields) -> int | None:
    """Return the seconds for which the student wants to wait in line; None if the student does not wait.

    The header is `Prefer: respond-async, wait=<seconds>` (RFC 7240). Without `wait`, the policy limits the wait.
    Unknown and invalid preferences are ignored, as the RFC requires. Of a repeated preference the first counts.
    """
    if _PREFER_FIELD not in fields:
        return None
    preferences: dict[bytes, bytes] = {}
    for field, value in scope["headers"]:
        if field == _PREFER_FIELD:
            for preference in _PREFERENCE.findall(value):
                name, _, word = preference.partition(b";")[0].partition(b"=")
                preferences.setdefault(name.strip(BLANKS).lower(), word.strip(BLANKS))
    if b"respond-async" not in preferences:
        return None
    wait = _WAIT.fullmatch(preferences.get(b"wait", b""))
    return MAX_SEC if wait is None else min(int(wait["seconds"]), MAX_SEC)


def read_secret_hash(scope: Scope, fields: Fields | None = None) -> str | None:
    """Return the SHA-256 of the lease secret in hexadecimal digits; None if the client sent none.

    Raises ApiError INVALID_HEADER. `fields` are those of `read_fields`, if they have been read.
    """
    if fields is None:
        fields = read_fields(scope)
    value = _read_value(SECRET, fields)
    if value is None:
        return None
    if len(value) < MIN_SECRET_LENGTH:
        raise ApiError(
            "INVALID_HEADER",
            f"{SECRET} has {len(value)} characters. Send {MIN_SECRET_LENGTH} to {MAX_ID_LENGTH} random ones.",
        )
    return hashlib.sha256(value.encode()).hexdigest()


class AllocationHeaders(NamedTuple):
    track_name: str | None
    name_prefix: str | None
    idempotency_key: str | None
    mode: LeaseMode
    access: Literal["user"] | None


def read_allocation_headers(fields: Fields) -> AllocationHeaders:
    """Return the optional headers of an allocation. Raises ApiError INVALID_HEADER."""
    return AllocationHeaders(
        _read_value(TRACK, fields),
        _read_value(PREFIX, fields),
        _read_value(KEY, fields),
        _read_mode(fields),
        _read_access(fields),
    )


def _read_mode(fields: Fields) -> LeaseMode:
    value = _read_value(MODE, fields)
    if value is None or value.lower() == "active":
        return "active"
    if value.lower() == "standby":
        return "standby"
    raise ApiError("INVALID_HEADER", f"{MODE} is '{value}'. Send standby, or omit the header.")


def _read_access(fields: Fields) -> Literal["user"] | None:
    value = _read_value(ACCESS, fields)
    if value is None:
        return None
    if value.lower() == "user":
        return "user"
    raise ApiError("INVALID_HEADER", f"{ACCESS} is '{value}'. Send user, or omit the header.")


# Schemas for the OpenAPI document. FastAPI does not validate them, because the errors above have their own codes.
_VALUE = WithJsonSchema({"type": "string", "maxLength": MAX_ID_LENGTH, "pattern": r"^[\x20-\x7e]*$"})
_STUDENT = WithJsonSchema(
    {
        "type": "string",
        "maxLength": MAX_ID_LENGTH,
        "pattern": r"^[\x20-\x7e]*[\x21-\x7e][\x20-\x7e]*$",
        "examples": ["inst-student-1-abc"],
    }
)
_UNRESTRICTED = WithJsonSchema({"type": "string"})


async def _holder(
    request: Request,
    _: Annotated[
        Any,
        _STUDENT,
        Header(
            alias=STUDENT,
            description="The student's own id (INSTRUQT_PARTICIPANT_ID). Required. "
            f"It does not begin with `{PSEUDONYM_PREFIX}`.",
        ),
    ] = None,
    __: Annotated[
        Any,
        _UNRESTRICTED,
        Header(
            alias=STUDENT_OLD,
            description=f"The old name of {STUDENT}. The gateway reads it only if {STUDENT} is absent.",
            deprecated=True,
        ),
    ] = None,
) -> str:
    return read_holder(request.scope, read_fields(request.scope))


async def _allocation(
    request: Request,
    _: Annotated[Any, _VALUE, Header(alias=TRACK, description="The name of the lab, for statistics.")] = None,
    __: Annotated[
        Any,
        _VALUE,
        Header(
            alias=PREFIX,
            description="The allocation is limited to sandboxes with exactly this prefix in their names.",
        ),
    ] = None,
    ___: Annotated[
        Any,
        _VALUE,
        Header(
            alias=KEY, description="A repetition with the same key from the same student returns the same lease."
        ),
    ] = None,
    ____: Annotated[
        Any,
        _UNRESTRICTED,
        Header(
            alias=PREFER,
            description="`respond-async, wait=<seconds>` (RFC 7240): wait in line if no sandbox is available. "
            "Other preferences are ignored.",
            examples=["respond-async, wait=900"],
        ),
    ] = None,
    _____: Annotated[
        Any,
        WithJsonSchema({"type": "string", "enum": ["active", "standby"], "examples": ["standby"]}),
        Header(
            alias=MODE,
            description="`standby` for the hot start of Instruqt: the lease ends after STANDBY_HOURS, unless it is "
            "claimed before, and its time starts with the claim. Default: `active`.",
        ),
    ] = None,
    ______: Annotated[
        Any,
        WithJsonSchema({"type": "string", "enum": ["user"], "examples": ["user"]}),
        Header(
            alias=ACCESS,
            description="`user`: a new lease has a login inside its sandbox, even if no policy grants one. "
            "`GET /v1/sandboxes/{sandbox_id}/access` returns it.",
        ),
    ] = None,
) -> AllocationHeaders:
    return read_allocation_headers(read_fields(request.scope))


async def _wait(
    request: Request,
    _: Annotated[
        Any,
        _UNRESTRICTED,
        Header(
            alias=PREFER,
            description="`respond-async, wait=<seconds>` (RFC 7240): wait in line if no sandbox is available.",
            examples=["respond-async, wait=900"],
        ),
    ] = None,
) -> int | None:
    return read_wait_sec(request.scope, read_fields(request.scope))


async def _extension_key(
    request: Request,
    _: Annotated[
        Any,
        _VALUE,
        Header(alias=KEY, description="A repetition with the same key does not extend the lease again."),
    ] = None,
) -> str | None:
    return _read_value(KEY, read_fields(request.scope))


async def _new_holder(
    request: Request,
    _: Annotated[
        Any,
        _VALUE,
        Header(
            alias=NEW_HOLDER,
            description="The id of the student, if the lease was taken under another id, before a student existed.",
        ),
    ] = None,
) -> str | None:
    return _read_student(NEW_HOLDER, read_fields(request.scope))


async def _lease_secret(
    request: Request,
    _: Annotated[
        Any,
        WithJsonSchema(
            {
                "type": "string",
                "maxLength": MAX_ID_LENGTH,
                "pattern": r"^([\x20-\x7e]{16,})?$",
            }
        ),
        Header(
            alias=SECRET,
            description="A secret of the client for the lease, because the student's id is not one. A lease that "
            "was made with a secret is repeated, read and changed only with the same secret. The broker keeps its "
            "hash.",
        ),
    ] = None,
) -> None:
    read_secret_hash(request.scope)


async def _webhook(
    _: Annotated[str, Header(alias="webhook-id", description="The id of the event.")] = "",
    __: Annotated[
        str,
        Header(
            alias="webhook-timestamp",
            description="The time of the attempt in Unix seconds. It is refused after five minutes.",
        ),
    ] = "",
    ___: Annotated[
        str,
        Header(
            alias="webhook-signature",
            description="Signatures `v1,<base64>`, separated by blanks. The three headers may also be named "
            "`svix-…`.",
        ),
    ] = "",
) -> None:
    """Describe the headers of a webhook. The signature check reads them."""


Holder = Annotated[str, Depends(_holder)]
WaitSec = Annotated[int | None, Depends(_wait)]
ExtensionKey = Annotated[str | None, Depends(_extension_key)]
LeaseSecret = Annotated[None, Depends(_lease_secret)]
NewHolder = Annotated[str | None, Depends(_new_holder)]
Allocation = Annotated[AllocationHeaders, Depends(_allocation)]
WebhookHeaders = Annotated[None, Depends(_webhook)]
