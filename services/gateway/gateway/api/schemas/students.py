"""Personal data of a student."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from sandbox_broker.contract.types import PrintableAscii


class StudentRequest(BaseModel):
    """The student is in the body, because paths are logged."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"examples": [{"student": "inst-student-1-abc"}]})

    student: PrintableAscii


class StudentForgotten(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    pseudonym: str = Field(examples=["forgotten-5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11"])
    leases: Annotated[int, Field(examples=[3], description="past leases that have the pseudonym now")]
