"""Named tokens: the copy of the database that a gateway checks requests against.

A named token is `sbt_<key id>_<secret>`. The key id finds the record. The hash of the whole token proves it. The
copy is refreshed every second, and earlier for a token that it does not accept, because another gateway may have
issued it. The allocator checks the token of a student's request again, in the transaction of its effect.
"""

import asyncio
import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog
from pydantic import SecretStr
from sqlalchemy.ext.asyncio import AsyncEngine

from gateway.queries import tokens
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import RecordTokenUses
from sandbox_broker.contract.tokens import Role
from sandbox_broker.messaging.outcome import CommandNotDone
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.runtime.settings import split_tokens

REFRESH_SEC = 1.0
MIN_REFRESH_SEC = 0.2
"""Shortest time between two refreshes, so that requests with unknown tokens cost the database little."""
MAX_AGE_SEC = 4.0
"""A revoked token must be refused within 5 s. An older copy is not enough for a route that the allocator does not
check."""
RECORD_USES_SEC = 10.0
RECORD_TIMEOUT_SEC = 5.0
MAX_USES = 10_000
"""Tokens per command."""

_TOKEN = re.compile(rb"sbt_([0-9a-f]{16})_[A-Za-z0-9_-]{43}")
_NO_HASH = bytes(32)
_MINUTE = 60

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class NamedToken:
    key_id: str
    name: str
    role: Role
    is_scoped: bool
    """Whether it reaches only the leases that were made with it."""
    expires_at: int | None
    """Unix seconds."""
    token_hash: bytes
    pepper_id: str | None


@dataclass(frozen=True, slots=True)
class NewToken:
    key_id: str
    token: str
    token_hash: str
    """Hexadecimal digits."""
    pepper_id: str | None


class NamedTokens:
    """Copy of the named tokens. The tasks `watch` and `record_uses` must be running."""

    def __init__(
        self,
        engine: AsyncEngine,
        rpc_client: RpcClient,
        peppers: SecretStr,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """The first of the comma-separated peppers is for new tokens. All are accepted."""
        self._engine = engine
        self._rpc_client = rpc_client
        self._clock = clock
        keys = [pepper.encode() for pepper in split_tokens(peppers)]
        self._peppers: Mapping[str | None, bytes] = {None: b"", **{_pepper_id(key): key for key in keys}}
        self._new_pepper_id = _pepper_id(keys[0]) if keys else None
        self._tokens: Mapping[bytes, NamedToken] = {}
        self._accepted: dict[bytes, NamedToken] = {}
        """Records by accepted token, since the last change. A token is hashed for its first request only."""
        self._version = -1
        self._loaded_at = float("-inf")
        self._started_at = float("-inf")
        self._requested: asyncio.Task[None] | None = None
        self._uses: dict[str, int] = {}
        """Last use of each token since the last record, in Unix seconds."""
        self._recorded: dict[str, int] = {}

    @property
    def is_fresh(self) -> bool:
        return self._clock() - self._loaded_at <= MAX_AGE_SEC

    def find(self, token: bytes) -> NamedToken | None:
        """Return the record of a valid token. The time does not depend on the secret part of the token, nor on
        whether the key id is known."""
        # A look-up compares the bytes of a token only if its randomised hash is that of an accepted one.
        record = self._accepted.get(token) or self._check(token)
        now = int(time.time())
        if record is None or (record.expires_at is not None and record.expires_at <= now):
            return None
        self._uses[record.key_id] = now - now % _MINUTE
        return record

    def _check(self, token: bytes) -> NamedToken | None:
        match = _TOKEN.fullmatch(token)
        if match is None:
            return None
        record = self._tokens.get(match[1])
        pepper = self._peppers.get(record.pepper_id if record else None, b"")
        is_same = hmac.compare_digest(
            hmac.digest(pepper, token, "sha256"), record.token_hash if record else _NO_HASH
        )
        if record is None or not is_same:
            return None
        self._accepted[token] = record
        return record

    def generate(self) -> NewToken:
        """Return a new token with 256 random bits."""
        key_id = secrets.token_hex(8)
        token = f"sbt_{key_id}_{secrets.token_urlsafe(32)}"
        pepper_id = self._new_pepper_id
        digest = hmac.digest(self._peppers[pepper_id], token.encode(), "sha256")
        return NewToken(key_id, token, digest.hex(), pepper_id)

    async def refresh(self) -> None:
        """Load the tokens if they have changed. Raises ApiError DATABASE_UNAVAILABLE."""
        started = self._started_at = self._clock()
        version, records = await tokens.changed_tokens(self._engine, self._version)
        if records is not None:
            self._tokens = {
                record["key_id"].encode(): NamedToken(
                    record["key_id"],
                    record["name"],
                    record["role"],
                    bool(record["tracks"] or record["prefixes"]),
                    record["expires_at"],
                    record["token_hash"],
                    record["pepper_id"],
                )
                for record in records
            }
            self._accepted = {}
        self._version, self._loaded_at = version, started

    async def refresh_for_unknown(self) -> None:
        """Wait for a refresh that begins after this call, unless the database is down. Callers share refreshes."""
        if self._requested is None:
            self._requested = asyncio.create_task(self._refresh_when_due())
        await asyncio.shield(self._requested)

    async def _refresh_when_due(self) -> None:
        await asyncio.sleep(self._started_at + MIN_REFRESH_SEC - self._clock())
        self._requested = None  # the database query begins, so later callers need another one
        await self._try_to_refresh()

    async def _try_to_refresh(self) -> None:
        try:
            await self.refresh()
        except Exception as error:  # noqa: BLE001 (the gateway serves students meanwhile, and tries again soon)
            log.warning("tokens.not_refreshed", error=str(error) or type(error).__name__)

    async def watch(self) -> None:
        while True:
            await self._try_to_refresh()
            await asyncio.sleep(REFRESH_SEC)

    async def record_uses(self) -> None:
        """Record the last use of tokens in batches, at most once a minute for each token."""
        while True:
            await asyncio.sleep(RECORD_USES_SEC)
            uses = {key_id: at for key_id, at in self._uses.items() if self._recorded.get(key_id) != at}
            uses = dict(list(uses.items())[:MAX_USES])
            if not uses:
                continue
            try:
                await self._rpc_client.request(
                    topology.ALLOCATOR_MAINTENANCE, RecordTokenUses(uses=uses), timeout_sec=RECORD_TIMEOUT_SEC
                )
            except CommandNotDone as error:
                log.info("tokens.uses_not_recorded", error=str(error))
                continue
            self._recorded.update(uses)


def looks_named(token: bytes) -> bool:
    return _TOKEN.fullmatch(token) is not None


def _pepper_id(pepper: bytes) -> str:
    return hashlib.sha256(pepper).hexdigest()[:8]
