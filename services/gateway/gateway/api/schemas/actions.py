"""Response bodies of administrators' actions, and of the jobs that long ones become."""

from typing import Literal

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import Count, JobId, Milliseconds, UnixSeconds
from sandbox_broker.contract.types import JobKind, JobState


class Purge(BaseModel):
    status: Literal["completed"] = "completed"
    deleted: Count
    duration_ms: Milliseconds


class RestoreConfirmed(BaseModel):
    changed: bool = Field(
        description="false if the broker knew no newer lease, or the restore was confirmed before", examples=[True]
    )


class Cleanup(BaseModel):
    status: Literal["completed"] = "completed"
    deleted: Count
    failed: Count = Field(description="failed attempts; the reaper retries them automatically")
    duration_ms: Milliseconds


class Job(BaseModel):
    job_id: JobId
    kind: JobKind
    state: JobState = Field(description="`held`: a sync that an administrator has to force")
    progress: dict[str, int] = Field(examples=[{"deleted": 12, "failed": 0}])
    result: dict[str, int | str] | None = Field(
        examples=[None, {"deleted": 40, "failed": 0}], description="null while the job is `running`"
    )
    started_at: UnixSeconds
    updated_at: UnixSeconds


class JobRunning(BaseModel):
    """Response to a request if its job takes longer than ADMIN_WAIT_SEC."""

    status: Literal["running"] = "running"
    job_id: JobId
    job_url: str = Field(examples=["/v1/admin/jobs/af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])
