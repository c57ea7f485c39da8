"""Response bodies about the stock: levels of the stock rules, and creation intents."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import Count, Cursor, ExternalId, MaybeSeconds, Name, UnixSeconds

NamePrefix = Annotated[str, Field(examples=["lab-adventure-"])]
CreationState = Literal["pending", "created", "failed", "abandoned"]
Seconds = Annotated[float, Field(examples=[151.2])]
MaybeText = Annotated[str | None, Field(examples=["CSP said 503", None])]


class CreationTime(BaseModel):
    """Measured times from the first claim of a creation intent until its sandbox is available."""

    count: Count = Field(description="number of measured creations, at most the last 50")
    p50_sec: Seconds | None
    p90_sec: Seconds | None


class IntentInFlight(BaseModel):
    creation_id: Annotated[int, Field(examples=[42])]
    name: Name
    state: CreationState = Field(
        examples=["pending"],
        description="`created`: CSP has the account, and the next sync imports it. `failed`: the account may still "
        "appear in the next listing",
    )
    age_sec: Seconds = Field(description="time since the intent was granted")
    claimed: bool = Field(examples=[True], description="the provisioner has it in hand")
    attempts: Count = Field(description="failed attempts")
    error: MaybeText = Field(description="error of the last attempt")


class StockLevel(BaseModel):
    name_prefix: NamePrefix
    policy: str = Field(examples=["adventure"], description="the policy with the stock rule")
    state: Literal["full", "filling", "limited", "stopped"] = Field(
        examples=["filling"],
        description="`limited`: `max` allows no more sandboxes. `stopped`: no account is created until an "
        "administrator resumes the prefix",
    )
    min: Count
    max: Count
    target: Count = Field(description="`min` plus the waiting students, at most `max`")
    available: Count
    allocated: Count
    creating: Count = Field(description="creation intents in flight; they count for `max`")
    waiting: Count = Field(description="students in the waiting line that the prefix fits")
    exhaustion_sec: Annotated[
        float | None,
        Field(
            examples=[5400.0, None],
            description="seconds until no sandbox is available at the higher of both rates; null without leases",
        ),
    ]
    recent_leases_per_hour: Annotated[float, Field(examples=[12.0], description="of the last five minutes")]
    usual_leases_per_hour: Annotated[float, Field(examples=[8.0], description="of the coming hour, a week ago")]
    creation: CreationTime
    failures: Count = Field(description="consecutive failed attempts")
    last_error: MaybeText
    last_error_at: MaybeSeconds
    stopped_at: MaybeSeconds
    stop_cause: Literal["refused", "failures"] | None = Field(
        examples=["refused", None], description="`refused`: CSP refused for a lasting reason, such as a quota"
    )
    stop_reason: MaybeText
    intents: list[IntentInFlight] = Field(description="the oldest 50 intents in flight")


class Stock(BaseModel):
    stock: list[StockLevel] = Field(description="one entry for each stock rule, in the order of the prefixes")
    asked_at: MaybeSeconds = Field(
        description="when a provisioner last asked for creations; null if it never has. With `STOCK_ENABLED=false` "
        "it does not ask"
    )


class StockResumed(BaseModel):
    name_prefix: NamePrefix
    changed: bool = Field(examples=[True], description="false if the prefix was not stopped")


class CreationStep(BaseModel):
    at: UnixSeconds
    what: str = Field(
        examples=["claimed"],
        description="granted, claimed, failed, created, imported, abandoned, or not listed: a listing showed that "
        "no account exists",
    )
    error: MaybeText = None


class Creation(BaseModel):
    """A creation intent with its history."""

    creation_id: Annotated[int, Field(examples=[42])]
    name: Name
    name_prefix: NamePrefix
    state: CreationState = Field(examples=["created"])
    in_flight: bool = Field(examples=[False], description="counts for `max`")
    granted_at: UnixSeconds
    first_claimed_at: MaybeSeconds
    created_at: MaybeSeconds
    imported_at: MaybeSeconds
    ended_at: MaybeSeconds
    attempts: Count = Field(description="failed attempts")
    error: MaybeText
    external_id: ExternalId | None
    history: list[CreationStep]


class CreationPage(BaseModel):
    creations: list[Creation]
    count: Count = Field(description="number of entries on this page")
    cursor: Cursor
