from pydantic import Field

from sandbox_broker.runtime.settings import DatabaseSettings, Port


class Settings(DatabaseSettings):
    allocator_port: Port = 9101
    lab_duration_hours: float = Field(default=4, gt=0, le=87_600)
    invariant_check_sec: float = Field(default=60, gt=0)
