from pydantic import Field

from sandbox_broker.runtime.settings import CspSettings, Port


class Settings(CspSettings):
    provisioner_port: Port = 9104
    stock_enabled: bool = False
    stock_dry_run: bool = False
    """Log the missing creations instead of creating accounts. Without an effect unless `stock_enabled`."""
    stock_interval_sec: float = Field(default=60, gt=0)
    create_concurrency: int = Field(default=2, ge=1, le=100)
    create_per_minute: int = Field(default=10, ge=1, le=1000)
    create_timeout_sec: float = Field(default=180, gt=0, le=3600)
    create_backoff_base_sec: float = Field(default=30, gt=0)
    create_backoff_max_sec: float = Field(default=900, gt=0)
    create_max_failures: int = Field(default=5, ge=1)
    create_sync_sec: float = Field(default=30, gt=0)
    circuit_breaker_threshold: int = Field(default=5, ge=1)
    circuit_breaker_timeout_sec: float = Field(default=60, gt=0)
