"""Policies and their changes."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

EXAMPLE = {
    "name": "adventure",
    "match": {"track_name": "lab-adventure"},
    "lease_hours": 8,
    "max_extension_hours": 4,
    "standby_hours": 24,
    "max_active": 100,
    "wait_minutes": 30,
    "max_replacements": 1,
    "access": {"groups": ["user", "act_admin"]},
    "stock": {"name_prefix": "lab-adventure-", "min": 20, "max": 60},
}


class Policies(BaseModel):
    policies: Annotated[
        list[dict[str, Any]],
        Field(
            examples=[[EXAMPLE]],
            description="policies by name, with the fields that were set. All fields except `name` are optional. "
            "`match` has one of `track_name`, `track_prefix` and `name_prefix`; the longest match wins, and the "
            "policy without one applies to all other requests",
        ),
    ]


class PolicyChange(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    name: str = Field(examples=["adventure"])
    change: Literal["added", "changed", "removed"]
    fields: Annotated[list[str], Field(examples=[["lease_hours"]], description="fields with another value")]


class PolicyChanges(BaseModel):
    changes: Annotated[list[PolicyChange], Field(description="empty if the policies were applied before")]
