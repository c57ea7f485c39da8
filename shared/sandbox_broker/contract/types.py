"""Types and bounds shared by commands, replies and events. Times are Unix seconds."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_ID_LENGTH = 128

MAX_SEC = 10 * 365 * 24 * 3600
"""Ten years, the upper bound of all durations."""

MAX_BIGINT = 2**63 - 1

MAX_TIME = 253_402_300_799
"""Last second of the year 9999, in Unix seconds."""

SandboxStatus = Literal["available", "allocated", "pending_deletion", "deletion_failed", "stale", "deleted"]

LeaseMode = Literal["active", "standby"]
"""`standby`: the time of the lease starts with its claim. A claimed lease is `active`."""

DeletionReason = Literal["student", "expired", "unclaimed", "broken", "play_ended", "admin"]
"""Why a lease ended. `unclaimed`: a standby lease without a claim. `broken`: its sandbox was replaced.
`play_ended`: Instruqt reported the end of the play."""

JobKind = Literal["sync", "cleanup"]

JobState = Literal["running", "completed", "held", "failed"]

PrintableAscii = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH, pattern=r"^[\x20-\x7e]+$")]
"""Value of an HTTP header: an id, a track name, a prefix or an idempotency key."""

SandboxId = PrintableAscii

PSEUDONYM_PREFIX = "forgotten-"
"""Beginning of every pseudonym of a student. The gateway accepts no student id that begins with it, because the
allocator does not replace such an id by a pseudonym."""

StorableText = Annotated[str, Field(pattern=r"^[^\x00]*$")]
"""Text without NUL, because PostgreSQL cannot store it."""


class Message(BaseModel):
    """Base class of all messages. Unknown fields are ignored, so that newer senders can add fields."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    version: Literal[1] = 1
