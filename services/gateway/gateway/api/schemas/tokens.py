"""Named tokens."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from sandbox_broker.contract.tokens import Role, TokenGrant

EXAMPLE: dict[str, Any] = {
    "name": "lab-adventure",
    "role": "track",
    "tracks": ["lab-adventure"],
    "prefixes": [],
    "max_active": 100,
    "max_new_per_hour": 300,
    "max_rate": 60,
    "expires_at": 1767225600,
}


class TokenRequest(TokenGrant):
    """Fields of a new token. All except `name` and `role` are optional."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})


class IssuedToken(BaseModel):
    name: str = Field(examples=["lab-adventure"])
    role: Role
    token: Annotated[
        str, Field(description="the token itself. The broker keeps only a hash and never shows it again")
    ]


class TokenRecord(BaseModel):
    """A named token without its secret. Times are Unix seconds."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(examples=["lab-adventure"])
    role: Role
    tracks: Annotated[list[str], Field(description="labs that the token may lease for; empty for all")]
    prefixes: Annotated[list[str], Field(description="name prefixes that it may ask for; empty for all")]
    max_active: Annotated[int | None, Field(description="limit of active leases")]
    max_new_per_hour: Annotated[int | None, Field(description="limit of new leases within any hour")]
    max_rate: Annotated[int | None, Field(description="limit of new leases within any minute")]
    expires_at: int | None
    issued_at: int
    issued_by: str | None
    suspended_at: Annotated[int | None, Field(description="null: not suspended")]
    last_used_at: Annotated[int | None, Field(description="last use, with minute precision; null: never")]


class Tokens(BaseModel):
    tokens: list[TokenRecord]


class HeldLease(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    sandbox_id: str = Field(examples=["2012224"])
    holder: str
    track_name: str | None
    allocated_at: int
    expires_at: int


class TokenSuspended(BaseModel):
    name: str = Field(examples=["lab-adventure"])
    changed: Annotated[bool, Field(description="false if it was in this state before")]
    released: Annotated[list[str], Field(description="sandboxes whose leases the call ended")]
    leases: Annotated[list[HeldLease], Field(description="active leases of the token, the newest 500")]


class TokenResumed(BaseModel):
    name: str = Field(examples=["lab-adventure"])
    changed: Annotated[bool, Field(description="false if it was not suspended")]
