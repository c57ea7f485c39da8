"""Response bodies about the waiting line for administrators."""

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import Count, Cursor, Holder, TrackName, UnixSeconds


class WaitingStudent(BaseModel):
    holder: Holder
    name_prefix: str | None = Field(examples=["lab-a-", None], description="null if the student takes any sandbox")
    track_name: TrackName
    waiting_since: UnixSeconds
    asked_at: UnixSeconds = Field(description="the last repetition of the request; it keeps the place")
    ends_at: UnixSeconds = Field(description="end of the longest wait")


class WaitingPage(BaseModel):
    waiting: list[WaitingStudent] = Field(description="in the order of the line, the next student first")
    count: Count = Field(description="number of entries on this page")
    cursor: Cursor
