"""Response bodies of the routes for tracks."""

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import ExternalId, Holder, Name, SandboxId, SfdcAccount, TrackName, UnixSeconds
from sandbox_broker.contract.types import SandboxStatus


class Lease(BaseModel):
    sandbox_id: SandboxId
    name: Name
    external_id: ExternalId
    allocated_at: UnixSeconds
    expires_at: UnixSeconds
    sfdc_account_id: SfdcAccount


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
