"""Types and bounds that commands, replies and events share. Times are Unix seconds."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_ID_LENGTH = 128

MAX_SEC = 10 * 365 * 24 * 3600
"""Ten years: no duration here is longer."""

MAX_BIGINT = 2**63 - 1

SandboxStatus = Literal["available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted"]

DeletionReason = Literal["student", "expired", "admin"]

JobKind = Literal["sync", "cleanup"]

JobState = Literal["running", "completed", "held", "failed"]

PrintableAscii = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH, pattern=r"^[\x20-\x7e]+$")]
"""What a header may carry here: an id, a track name, a prefix, an idempotency key."""

SandboxId = PrintableAscii

StorableText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""PostgreSQL stores no NUL."""


class Message(BaseModel):
    """The common ground of all messages. Unknown fields are ignored, so that a newer sender can add some."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
