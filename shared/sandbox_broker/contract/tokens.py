"""Named tokens: their grant, and the sender of a command."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from sandbox_broker.contract.types import MAX_TIME, PrintableAscii, StorableText

Role = Literal["track", "viewer", "operator", "admin"]
"""`viewer` reads admin routes. `operator` also sends their commands. `admin` also manages tokens and policies.
`track` uses the routes for students, and so does `admin`."""

MAX_SCOPES = 100
MAX_LIMIT = 1_000_000

TokenName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
KeyId = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
"""Part of a token that is no secret. It finds the record of the token."""
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
"""Hash in hexadecimal digits."""

Limit = Annotated[int, Field(ge=0, le=MAX_LIMIT)]


class TokenGrant(BaseModel):
    """Rights and limits of a named token. They never change: issue another token instead."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: TokenName
    role: Role
    tracks: tuple[PrintableAscii, ...] = Field(default=(), max_length=MAX_SCOPES)
    """Labs that the token may lease for. Empty: all."""
    prefixes: tuple[PrintableAscii, ...] = Field(default=(), max_length=MAX_SCOPES)
    """Beginnings of the name prefixes that the token may ask for. Empty: all."""
    max_active: Limit | None = None
    """Limit of the active leases that were made with the token."""
    max_new_per_hour: Limit | None = None
    """Limit of new leases within any hour."""
    max_rate: Limit | None = None
    """Limit of new leases within any minute."""
    expires_at: int | None = Field(default=None, ge=0, le=MAX_TIME)
    """Unix seconds. None: never."""

    @model_validator(mode="after")
    def _check_role(self) -> Self:
        if self.role != "track" and (self.is_scoped or self.has_quota):
            raise ValueError("tracks, prefixes and limits need the role track")
        return self

    @property
    def is_scoped(self) -> bool:
        """Whether the token is limited to labs or name prefixes, and to the leases that were made with it."""
        return bool(self.tracks or self.prefixes)

    @property
    def has_quota(self) -> bool:
        return any(limit is not None for limit in (self.max_active, self.max_new_per_hour, self.max_rate))


class Sender(BaseModel):
    """Sender of a command: the gateway sets it for named tokens and for administrators."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    actor: str = Field(min_length=1, max_length=128)
    """Name of the token, or `$` and the name of the setting that lists it."""
    key_id: KeyId | None = None
    """None: a token of a setting."""
    address: str | None = Field(default=None, max_length=64)
    """Address of the client."""
    reason: StorableText | None = Field(default=None, max_length=500)
    """Reason that an administrator gave."""
