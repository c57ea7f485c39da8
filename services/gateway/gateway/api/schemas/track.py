"""Response bodies of the routes for tracks."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import (
    Count,
    ExternalId,
    Holder,
    MaybeCount,
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
