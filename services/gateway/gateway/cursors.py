"""Cursors: where the next page of a listing begins, as a text that only we can read.

A cursor holds the key of the last row that was seen, and a seal over that key, the listing and its filters. So one
that was made up, cut short, or taken from another listing is told apart from one that we gave.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime

from gateway.errors import ApiError

Key = Sequence[str | int | datetime]

SEAL_BYTES = 8


def encode(key: Key, *listing: object) -> str:
    """`listing`: its name and its filters."""
    body = json.dumps(
        [value.isoformat() if isinstance(value, datetime) else value for value in key], separators=(",", ":")
    ).encode()
    return base64.urlsafe_b64encode(_seal(body, listing) + body).decode().rstrip("=")


def decode(cursor: str, *listing: object) -> list[str | int]:
    """The key; times as ISO 8601. Raises ApiError INVALID_CURSOR."""
    try:
        sealed = base64.b64decode(cursor + "=" * (-len(cursor) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise _invalid() from None
    seal, body = sealed[:SEAL_BYTES], sealed[SEAL_BYTES:]
    if seal != _seal(body, listing):
        raise _invalid()
    key: list[str | int] = json.loads(body)
    return key


def _seal(body: bytes, listing: Sequence[object]) -> bytes:
    return hashlib.blake2b(repr(listing).encode() + body, digest_size=SEAL_BYTES).digest()


def _invalid() -> ApiError:
    return ApiError(
        "INVALID_CURSOR",
        "This cursor is not of this listing with these filters. Begin again without one, and keep the filters.",
    )
