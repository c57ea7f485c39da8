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
    role: Role = Field(examples=["track"])
    token: Annotated[
        str,
        Field(
            examples=["sbt_0123456789abcdef_<secret>"],
            description="the token itself. The broker keeps only a hash and never shows it again",
        ),
    ]


class TokenRecord(BaseModel):
    """A named token without its secret. Times are Unix seconds."""

    model_config = ConfigDict(from_attributes=True)

    name: str = Field(examples=["lab-adventure"])
    role: Role = Field(examples=["track"])
    tracks: Annotated[
        list[str],
        Field(examples=[["lab-adventure"]], description="labs that the token may lease for; empty for all"),
    ]
    prefixes: Annotated[
        list[str], Field(examples=[["lab-"]], description="name prefixes that it may ask for; empty for all")
    ]
    max_active: Annotated[int | None, Field(examples=[100], description="limit of active leases")]
    max_new_per_hour: Annotated[
        int | None, Field(examples=[300], description="limit of new leases within any hour")
    ]
    max_rate: Annotated[int | None, Field(examples=[60], description="limit of new leases within any minute")]
    expires_at: int | None = Field(examples=[1767225600])
    issued_at: int = Field(examples=[1728054123])
    issued_by: str | None = Field(examples=["$BROKER_ADMIN_TOKEN"])
    suspended_at: Annotated[int | None, Field(examples=[1728054200], description="null: not suspended")]
    last_used_at: Annotated[
        int | None, Field(examples=[1728054180], description="last use, with minute precision; null: never")
    ]


class Tokens(BaseModel):
    tokens: list[TokenRecord]


class HeldLease(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    sandbox_id: str = Field(examples=["2012224"])
    holder: str = Field(examples=["inst-student-1-abc"])
    track_name: str | None = Field(examples=["lab-adventure"])
    allocated_at: int = Field(examples=[1728054123])
    expires_at: int = Field(examples=[1728068523])


class TokenSuspended(BaseModel):
    name: str = Field(examples=["lab-adventure"])
    changed: Annotated[bool, Field(examples=[True], description="false if it was in this state before")]
    released: Annotated[
        list[str], Field(examples=[["2012224"]], description="sandboxes whose leases the call ended")
    ]
    leases: Annotated[list[HeldLease], Field(description="active leases of the token, the newest 500")]


class TokenResumed(BaseModel):
    name: str = Field(examples=["lab-adventure"])
    changed: Annotated[bool, Field(examples=[True], description="false if it was not suspended")]
