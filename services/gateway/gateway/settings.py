from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationInfo, field_validator

from gateway.web import client_address, cors, rate_limit
from sandbox_broker.runtime.settings import DatabaseSettings, Port, Tokens, none_if_empty, split_tokens


def _validate_rate(value: str) -> str:
    if value.strip():
        rate_limit.parse_rate(value.strip())
    return value.strip()


def _validate_proxies(value: str) -> str:
    try:
        client_address.parse_networks(value)
    except ValueError as error:
        raise ValueError(f"must be a comma-separated list of addresses and networks: {error}") from error
    return value


def _validate_origins(value: str) -> str:
    try:
        cors.parse_origins(value)
    except ValueError as error:
        raise ValueError(f"must be a comma-separated list of origins, or only *: {error}") from error
    return value


def _validate_ops_port(value: int | None, info: ValidationInfo) -> int | None:
    if value is not None and value == info.data.get("gateway_port"):
        raise ValueError("must differ from GATEWAY_PORT")
    return value


class Settings(DatabaseSettings):
    broker_api_token: Tokens
    broker_admin_token: Tokens
    gateway_port: Port = 8080
    ops_port: Annotated[Port | None, BeforeValidator(none_if_empty), AfterValidator(_validate_ops_port)] = None
    """Port of /healthz, /readyz and /metrics. None: they use `gateway_port`."""
    allocate_timeout_sec: float = Field(default=5, gt=0, le=60)
    rate_limit: Annotated[str, AfterValidator(_validate_rate)] = "2000/5 minutes"
    trusted_proxies: Annotated[str, AfterValidator(_validate_proxies)] = ""
    docs_enabled: bool = True
    cors_allowed_origins: Annotated[str, AfterValidator(_validate_origins)] = ""
    client_timeout_sec: float = Field(default=30, gt=0, le=300)
    max_connections_per_address: int = Field(default=1000, ge=1, le=1_000_000)
    drain_sec: float = Field(default=5, ge=0, le=20)
    admin_wait_sec: float = Field(default=25, gt=0, le=300)

    @field_validator("broker_admin_token")
    @classmethod
    def _refuse_track_token(cls, value: SecretStr, info: ValidationInfo) -> SecretStr:
        track = info.data.get("broker_api_token")
        if track is not None and not set(split_tokens(track)).isdisjoint(split_tokens(value)):
            raise ValueError(
                "contains a token of BROKER_API_TOKEN, so every track could administer the broker; "
                "use another token"
            )
        return value
