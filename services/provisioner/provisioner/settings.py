from typing import Self

from pydantic import Field, SecretStr, model_validator

from sandbox_broker.runtime.settings import AccessKeyList, CspSettings, Port

DOMAIN = r"([A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}"


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
    csp_login_email: str = Field(default="", max_length=254)
    """Administrator who creates logins inside sandboxes. Empty: no logins."""
    csp_login_password: SecretStr = SecretStr("")
    access_keys: AccessKeyList = SecretStr("")
    access_email_domain: str = Field(default="", max_length=120, pattern=rf"^({DOMAIN})?$")
    access_concurrency: int = Field(default=5, ge=1, le=100)
    access_timeout_sec: float = Field(default=600, gt=0, le=86_400)
    """Time after the begin of a lease, after which a login without success counts as failed."""
    access_attempt_timeout_sec: float = Field(default=30, gt=0, le=600)
    access_removal_wait_sec: float = Field(default=300, ge=0, le=86_400)
    """Longest wait of the deletion of a sandbox for the removal of its login."""

    @property
    def has_access(self) -> bool:
        """Whether the provisioner creates logins."""
        return bool(self.csp_login_email)

    @model_validator(mode="after")
    def _check_access(self) -> Self:
        needed = {
            "CSP_LOGIN_EMAIL": self.csp_login_email,
            "CSP_LOGIN_PASSWORD": self.csp_login_password.get_secret_value(),
            "ACCESS_KEYS": self.access_keys.get_secret_value(),
            "ACCESS_EMAIL_DOMAIN": self.access_email_domain,
        }
        missing = [name for name, value in needed.items() if not value.strip()]
        if missing and self.has_access:
            raise ValueError(
                f"{' and '.join(missing)} must be set, because logins inside sandboxes need {', '.join(needed)}"
            )
        return self
