"""Audit pages."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class AuditEntry(BaseModel):
    """A command of an administrator, or a refusal for scope."""

    model_config = ConfigDict(from_attributes=True)

    audit_id: int = Field(examples=[1])
    at: Annotated[int, Field(examples=[1728054123], description="Unix seconds")]
    actor: Annotated[
        str,
        Field(
            examples=["night-shift"],
            description="name of the token; `$BROKER_ADMIN_TOKEN` for a token of this setting",
        ),
    ]
    action: str = Field(examples=["lease.release"])
    object: Annotated[
        str | None,
        Field(examples=["2012224"], description="id or name of the sandbox, job, token, dead letter or lab"),
    ]
    reason: str | None = Field(examples=["class over"])
    request_id: str | None = Field(examples=["5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11"])
    address: Annotated[str | None, Field(examples=["192.0.2.1"], description="address of the client")]
    outcome: Annotated[str, Field(examples=["done"], description="`done`, `unchanged`, or the code of the refusal")]


class AuditPage(BaseModel):
    entries: list[AuditEntry]
    count: int = Field(examples=[1])
    cursor: str | None = Field(examples=[None])
