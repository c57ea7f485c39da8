"""Bodies of the webhook of Instruqt."""

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

EventOutcome = Literal[
    "released", "stopped_waiting", "no_lease", "newer_lease", "no_participant", "ignored", "shadow"
]


class InstruqtEvent(BaseModel):
    """The fields that the broker reads. An event has more."""

    model_config = ConfigDict(extra="allow")

    type: str = Field(min_length=1, examples=["track.completed"])
    participant_id: str | None = Field(
        default=None, examples=["tncb0s7cdkyu"], description="the participant id of the play"
    )
    timestamp: datetime | None = Field(
        default=None,
        examples=["2026-03-27T16:14:57.312977Z"],
        description="time of the event. Without it, the time of the sending attempt counts",
    )


class EventResult(BaseModel):
    outcome: EventOutcome = Field(
        description="`released`: the lease of the participant has ended. `stopped_waiting`: the participant has "
        "lost the place in the waiting line. `no_lease`: the participant has neither. `newer_lease`: the lease "
        "began after the event, so it stays. `no_participant`: the event names no participant. `ignored`: the type "
        "is not in `INSTRUQT_END_EVENTS`. `shadow`: `INSTRUQT_EVENTS_SHADOW` is set, so the broker only counted "
        "and logged the event"
    )
