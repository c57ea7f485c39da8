from pydantic import Field

from sandbox_broker.runtime.settings import CspSettings, Port


class Settings(CspSettings):
    csp_syncer_port: Port = 9103
    sync_interval_sec: float = Field(default=600, gt=0)
    sync_max_stale_fraction: float = Field(default=0.25, ge=0, le=1)
    record_retention_days: float = Field(default=30, gt=0, le=3650)
