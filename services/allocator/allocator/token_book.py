"""Token book: the named tokens of the database in memory, and the rights that they give to a request.

It is loaded with the policy book and has the same version: a statement that grants leases under an outdated book is
refused (`write_session.PoliciesChanged`).
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sandbox_broker.contract.commands import AllocateSandbox
from sandbox_broker.contract.tokens import Sender

TokenOutcome = Literal["token_ended", "out_of_scope"]

LOAD = """
SELECT coalesce(jsonb_agg(jsonb_build_object(
    'key_id', key_id, 'name', name, 'tracks', tracks, 'prefixes', prefixes, 'max_active', max_active,
    'max_new_per_hour', max_new_per_hour, 'max_rate', max_rate,
    'expires_at', floor(extract(epoch FROM expires_at))::bigint
)), '[]') FROM tokens WHERE revoked_at IS NULL AND suspended_at IS NULL
"""
"""Scalar query for the tokens that are neither revoked nor suspended."""


@dataclass(frozen=True, slots=True)
class Token:
    name: str
    tracks: frozenset[str]
    prefixes: tuple[str, ...]
    max_active: int | None
    max_new_per_hour: int | None
    max_rate: int | None
    """Limit of new leases within any minute."""
    expires_at: int | None
    """Unix seconds."""

    @property
    def is_scoped(self) -> bool:
        """Whether the token reaches only the leases that were made with it."""
        return bool(self.tracks or self.prefixes)

    @property
    def has_quota(self) -> bool:
        return not self.max_active is self.max_new_per_hour is self.max_rate is None

    def permits(self, *, track_name: str | None, name_prefix: str | None) -> bool:
        """Return whether the token may lease for this lab and name prefix."""
        if self.tracks and track_name not in self.tracks:
            return False
        return not self.prefixes or (name_prefix is not None and name_prefix.startswith(self.prefixes))


class TokenBook:
    def __init__(self) -> None:
        self._tokens: Mapping[str, Token] = {}

    def fill(self, documents: Iterable[Mapping[str, Any]]) -> None:
        """Replace the tokens. A document has the fields of LOAD."""
        self._tokens = {
            document["key_id"]: Token(
                name=document["name"],
                tracks=frozenset(document["tracks"]),
                prefixes=tuple(document["prefixes"]),
                max_active=document["max_active"],
                max_new_per_hour=document["max_new_per_hour"],
                max_rate=document["max_rate"],
                expires_at=document["expires_at"],
            )
            for document in documents
        }

    def find(self, sender: Sender | None) -> Token | Literal["token_ended"] | None:
        """Return the token of the sender. None: a token of a setting. `token_ended`: the token was revoked or
        suspended, has expired, or is not in the book yet."""
        if sender is None or sender.key_id is None:
            return None
        token = self._tokens.get(sender.key_id)
        if token is None or (token.expires_at is not None and token.expires_at <= time.time()):
            return "token_ended"
        return token

    def judge(self, command: AllocateSandbox) -> Token | TokenOutcome | None:
        """Like `find`, and `out_of_scope` if the token does not permit the allocation."""
        token = self.find(command.sender)
        if isinstance(token, Token) and not token.permits(
            track_name=command.track_name, name_prefix=command.name_prefix
        ):
            return "out_of_scope"
        return token
