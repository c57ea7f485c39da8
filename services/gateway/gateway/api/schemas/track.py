"""Request and response bodies of the routes for tracks."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from gateway.api.schemas.fields import (
    ClaimedAt,
    Count,
    ExternalId,
    Holder,
    MaybeCount,
    Mode,
    Name,
    SandboxId,
    SfdcAccount,
    TrackName,
    UnixSeconds,
)
from sandbox_broker.contract.types import SandboxStatus


class Lease(BaseModel):
    sandbox_id: SandboxId
    name: Name
    external_id: ExternalId
    allocated_at: UnixSeconds
    expires_at: UnixSeconds
    sfdc_account_id: SfdcAccount


class Waiting(BaseModel):
    """The place of a student in the waiting line."""

    status: Literal["waiting"] = "waiting"
    position: Count = Field(
        description="1 for the next student. It counts the students who could receive the same sandbox"
    )
    waiting_since: UnixSeconds
    estimated_wait_sec: MaybeCount = Field(
        description="seconds until the student probably gets a sandbox; null if unknown"
    )
    retry_after: Annotated[
        int, Field(examples=[5], description="seconds until the same request should be repeated")
    ]


class StandbyLease(Lease):
    """A lease that was taken in standby. Before the claim, `expires_at` is the latest time of the claim."""

    mode: Mode
    claimed_at: ClaimedAt


class ExtensionRequest(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"hours": 2}]})

    hours: Annotated[
        float,
        Field(strict=True, gt=0, le=87_600, allow_inf_nan=False, examples=[2], description="may be a fraction"),
    ]


class Extension(BaseModel):
    expires_at: UnixSeconds
    max_expires_at: Annotated[
        int,
        Field(
            examples=[1728082923],
            description="Unix seconds: the latest end that the student can reach by further extensions",
        ),
    ]


class ReplacementRequest(BaseModel):
    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "DNS profile cannot be saved"}]})

    reason: Annotated[
        str,
        Field(
            min_length=1,
            max_length=500,
            pattern=r"^[^\x00]*[^\x00\s][^\x00]*$",
            examples=["DNS profile cannot be saved"],
            description="kept for the operator who inspects the broken sandbox",
        ),
    ]


class Release(BaseModel):
    sandbox_id: SandboxId
    status: SandboxStatus
    deletion_requested_at: UnixSeconds


class Sandbox(BaseModel):
    sandbox_id: SandboxId
    name: Name
    external_id: ExternalId
    status: SandboxStatus
    allocated_to_track: Holder = Field(description="the student's id (the field keeps its old name)")
    allocated_at: UnixSeconds
    expires_at: UnixSeconds
    track_name: TrackName
    sfdc_account_id: SfdcAccount
