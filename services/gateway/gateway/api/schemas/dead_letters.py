"""Response bodies about dead letters."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from gateway.api.schemas.fields import Count, Cursor, DeadLetterId, QueueName, UnixSeconds


class DeadLetterSummary(BaseModel):
    dead_letter_id: DeadLetterId
    died_at: UnixSeconds
    service: str = Field(examples=["allocator"], description="the service that could not process the message")
    queue: QueueName = Field(description="the queue in which the message died")
    reason: str = Field(examples=["It is no envelope of commands: Invalid JSON"])
    commands: list[str] = Field(examples=[["ReleaseSandbox"]], description="the types of all readable commands")
    size: Annotated[int, Field(examples=[212], description="bytes")]


class DeadLetterPage(BaseModel):
    dead_letters: list[DeadLetterSummary]
    count: Count = Field(description="number of entries on this page")
    cursor: Cursor


class DeadLetter(DeadLetterSummary):
    message_id: str | None = Field(examples=["1c8d6f0c7f4b4e9d8a55e0a4d1c7b9aa", None])
    correlation_id: str | None = Field(examples=["f3a94f5be9c1466c8c9c34a5a3b7f0d2", None])
    content_type: str | None = Field(examples=["application/json", None])
    payload: str = Field(
        examples=['{"commands":[{"type":"ReleaseSandbox"}]}'],
        description="the first 64 KiB of the message",
    )
    encoding: Literal["utf-8", "base64"] = Field(description="the encoding of `payload`")


class DeadLetterReplayed(BaseModel):
    status: Literal["replayed"] = "replayed"
    dead_letter_id: DeadLetterId
    queue: QueueName
    published: bool = Field(examples=[True], description="false if no command was left to replay")
    skipped: Count = Field(
        description="allocations that were not replayed, because their students have had a sandbox since"
    )


class DeadLetterDropped(BaseModel):
    status: Literal["dropped"] = "dropped"
    dead_letter_id: DeadLetterId
