from pydantic import Field

from sandbox_broker.runtime.settings import CspSettings, Port


class Settings(CspSettings):
    csp_syncer_port: Port = 9103
    sync_interval_sec: float = Field(default=600, gt=0)
    sync_max_stale_fraction: float = Field(default=0.25, ge=0, le=1)
    sync_max_growth_fraction: float = Field(default=1, ge=0, le=1000)
    sync_name_allow: str = ""
    """Comma-separated name prefixes. Empty: all names."""
    record_retention_days: float = Field(default=30, gt=0, le=3650)
    audit_retention_days: float = Field(default=400, gt=0, le=3650)
    lease_personal_days: float = Field(default=400, gt=0, le=3650)
    """Days between the end of a lease and the replacement of its student ids by pseudonyms."""

    @property
    def name_prefixes(self) -> tuple[str, ...]:
        """Return the allowed name prefixes. One of them is empty if all names are allowed."""
        return tuple(prefix for prefix in map(str.strip, self.sync_name_allow.split(",")) if prefix) or ("",)
