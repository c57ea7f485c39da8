"""Response bodies about syncs, applied and held."""

from typing import Literal

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import Count, ListingId, Milliseconds, Name, SandboxId, UnixSeconds


class Sync(BaseModel):
    status: Literal["completed"] = "completed"
    synced: Count = Field(description="active sandbox accounts in CSP")
    marked_stale: Count
    restored: Count
    duration_ms: Milliseconds


class AppliedSync(BaseModel):
    listing_id: ListingId
    begun_at: UnixSeconds
    applied_at: UnixSeconds
    synced: Count = Field(description="active sandbox accounts in CSP")
    discovered: Count
    restored: Count
    marked_stale: Count
    reopened: Count = Field(description="deleted sandboxes that CSP still lists; they are deleted again")
    leaked: Count = Field(default=0, description="accounts that CSP lists and the pool does not contain")


class SandboxName(BaseModel):
    sandbox_id: SandboxId
    name: Name


class Change(BaseModel):
    count: Count
    examples: list[SandboxName] = Field(description="at most 20")


class HeldSync(BaseModel):
    listing_id: ListingId
    begun_at: UnixSeconds
    held_at: UnixSeconds
    reason: str = Field(examples=["The listing is empty."])
    stale: Change = Field(description="available sandboxes that are not in the listing")
    missing: Change = Field(description="allocated sandboxes that are not in the listing; they would be flagged")
    moved: Change = Field(description="sandboxes with another account in the listing")
    discovered: Change
    restored: Change


class SyncState(BaseModel):
    applied: AppliedSync | None = Field(description="the latest applied listing")
    held: HeldSync | None = Field(
        description="the newest listing if it is held, and the changes that it would make"
    )
