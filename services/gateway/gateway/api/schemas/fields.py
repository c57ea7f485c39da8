"""Types of fields that several response bodies share."""

import uuid
from typing import Annotated, get_args

from pydantic import Field

from sandbox_broker.contract.types import DeletionReason, LeaseMode

SandboxId = Annotated[str, Field(examples=["2012224"], description="the csp_id of CSP, as text")]
Name = Annotated[str, Field(examples=["sandbox-1"])]
ExternalId = Annotated[
    str, Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"], description="the UUID of the account in CSP")
]
SfdcAccount = Annotated[str | None, Field(examples=["0014X00002nYyZ0QAK", None])]
TrackName = Annotated[str | None, Field(examples=["dns-basics", None], description="the name of the lab")]
UnixSeconds = Annotated[int, Field(examples=[1728054123], description="Unix seconds")]
Milliseconds = Annotated[int, Field(examples=[1250])]
Count = Annotated[int, Field(examples=[12])]
MaybeCount = Annotated[int | None, Field(examples=[12, None])]
Holder = Annotated[str, Field(examples=["inst-student-1-abc"])]
MaybeSeconds = Annotated[int | None, Field(examples=[1728054123, None])]
# Text, because an allocator of the next version may write other reasons than those of DeletionReason.
EndReason = Annotated[
    str | None,
    Field(
        examples=["student", None],
        description="why the lease ended: " + ", ".join(f"`{reason}`" for reason in get_args(DeletionReason)) + ". "
        "`unclaimed`: a standby lease without a claim. `broken`: its sandbox was replaced. `play_ended`: Instruqt "
        "reported the end of the play. Later versions may add reasons",
    ),
]
Mode = Annotated[
    LeaseMode,
    Field(examples=["active"], description="`standby` until the claim of a standby lease, otherwise `active`"),
]
ClaimedAt = Annotated[
    int | None,
    Field(
        examples=[None, 1728054123],
        description="when a standby lease was claimed, in Unix seconds; null without a claim",
    ),
]
Cursor = Annotated[
    str | None,
    Field(
        examples=["2vYx8hZk3nRbMjAxMjIyNCJd", None],
        description="the cursor of the next page; null on the last page. A page may have less than `limit` entries",
    ),
]
ListingId = Annotated[int, Field(examples=[4711])]
JobId = Annotated[uuid.UUID, Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])]
DeadLetterId = Annotated[uuid.UUID, Field(examples=["af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3"])]
QueueName = Annotated[str, Field(examples=["allocator.commands"])]
