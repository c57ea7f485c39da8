"""Cursors of keyset pagination: the position of the next page of a listing, as opaque text.

A cursor holds the key of the last row of a page, and a checksum over this key, the listing and its filters. The
checksum detects a truncated cursor, and a cursor of another listing or other filters.

The checksum is not a signature: any client can compute it. A signature would need a secret that all gateways share,
and would not protect data: a forged key only moves the start of a page, and the filters apply to every page.
`decode` validates the key in full instead, because a key of other types would fail in the database (500).
"""

import base64
import hashlib
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from gateway.api.errors import ApiError

Key = Sequence[str | int | datetime | uuid.UUID]

MAX_LENGTH = 2048
"""Longest cursor, in characters. A name of 255 characters of 4 bytes each takes 1,400."""

_CHECKSUM_BYTES = 8


def encode(key: Key, *listing: object) -> str:
    """Return the cursor of the page after `key`. `listing` is the name of the listing and its filters."""
    body = json.dumps([_jsonable(value) for value in key], separators=(",", ":"), ensure_ascii=False).encode()
    return base64.urlsafe_b64encode(_checksum(body, listing) + body).decode().rstrip("=")


def decode(cursor: str, types: Sequence[type], *listing: object) -> list[Any]:
    """Return the key: one value for each of `types`, the types of the columns that order the listing.

    A str is valid UTF-8 without NUL, an int is a bigint, a datetime has a time zone. Raises ApiError
    INVALID_CURSOR.
    """
    try:
        decoded = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
        checksum, body = decoded[:_CHECKSUM_BYTES], decoded[_CHECKSUM_BYTES:]
        if checksum != _checksum(body, listing):
            raise invalid_cursor()
        values = json.loads(body)
        if not isinstance(values, list):
            raise invalid_cursor()
        return [_READERS[type_](value) for value, type_ in zip(values, types, strict=True)]
    except (ValueError, OverflowError, RecursionError):
        raise invalid_cursor() from None


def invalid_cursor() -> ApiError:
    return ApiError(
        "INVALID_CURSOR",
        "This cursor belongs to another listing or other filters. Start without a cursor, and keep the filters.",
    )


def _jsonable(value: str | int | datetime | uuid.UUID) -> str | int:
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, uuid.UUID) else value


def _checksum(body: bytes, listing: Sequence[object]) -> bytes:
    return hashlib.blake2b(repr(listing).encode() + body, digest_size=_CHECKSUM_BYTES).digest()


def _read_text(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    value.encode()  # raises UnicodeEncodeError for lone surrogates, which PostgreSQL cannot store
    return value


def _read_integer(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not -(2**63) <= value < 2**63:
        raise ValueError
    return value


def _read_time(value: object) -> datetime:
    time = datetime.fromisoformat(_read_text(value))
    if time.tzinfo is None:
        raise ValueError
    return time.astimezone(UTC)  # raises OverflowError outside the years 1 to 9999


def _read_uuid(value: object) -> uuid.UUID:
    return uuid.UUID(_read_text(value))


_READERS: Mapping[type, Callable[[object], object]] = {
    str: _read_text,
    int: _read_integer,
    datetime: _read_time,
    uuid.UUID: _read_uuid,
}
