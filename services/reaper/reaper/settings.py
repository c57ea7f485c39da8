from pydantic import Field, SecretStr, ValidationInfo, field_validator

from sandbox_broker.runtime.settings import CspSettings, CspUrl, Port


class Settings(CspSettings):
    reaper_port: Port = 9102
    auto_expiry_interval_sec: float = Field(default=60, gt=0)
    grace_period_minutes: float = Field(default=30, ge=0)
    cleanup_interval_sec: float = Field(default=300, gt=0)
    cleanup_concurrency: int = Field(default=2, ge=1, le=100)
    cleanup_batch_size: int = Field(default=10, ge=1, le=1000)
    cleanup_batch_delay_sec: float = Field(default=2, ge=0)
    cleanup_per_sandbox_delay_sec: float = Field(default=0, ge=0)
    deletion_backoff_base_sec: float = Field(default=30, gt=0)
    deletion_backoff_max_sec: float = Field(default=3600, gt=0)
    deletion_max_attempts: int = Field(default=8, ge=1)
    circuit_breaker_threshold: int = Field(default=5, ge=1)
    circuit_breaker_timeout_sec: float = Field(default=60, gt=0)
    niosxaas_enabled: bool = False
    niosxaas_shadow_mode: bool = False
    niosxaas_base_url: CspUrl = "https://csp.infoblox.com"
    niosxaas_email: str = Field(default="", validate_default=True)
    niosxaas_password: SecretStr = Field(default=SecretStr(""), validate_default=True)
    niosxaas_service_name: str = ""

    @field_validator("niosxaas_email", "niosxaas_password")
    @classmethod
    def _needed_when_enabled(cls, value: str | SecretStr, info: ValidationInfo) -> str | SecretStr:
        text = value.get_secret_value() if isinstance(value, SecretStr) else value
        if info.data.get("niosxaas_enabled") and not text.strip():
            raise ValueError("is needed with NIOSXAAS_ENABLED")
        return value
