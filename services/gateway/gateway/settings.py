from typing import Annotated

from pydantic import AfterValidator, Field

from gateway import addresses, cors, limits
from sandbox_broker.settings import DatabaseUrl, Port, ServiceSettings, Tokens


def _rate(value: str) -> str:
    if value.strip():
        limits.rate(value.strip())
    return value.strip()


def _proxies(value: str) -> str:
    try:
        addresses.networks(value)
    except ValueError as error:
        raise ValueError(f"must be a comma-separated list of addresses and networks: {error}") from error
    return value


def _origins(value: str) -> str:
    try:
        cors.origins(value)
    except ValueError as error:
        raise ValueError(f"must be a comma-separated list of origins, or * alone: {error}") from error
    return value


class Settings(ServiceSettings):
    database_url: DatabaseUrl = Field(repr=False)
    broker_api_token: Tokens
    broker_admin_token: Tokens
    gateway_port: Port = 8080
    allocate_timeout_sec: float = Field(default=5, gt=0, le=60)
    rate_limit: Annotated[str, AfterValidator(_rate)] = "2000/5 minutes"
    trusted_proxies: Annotated[str, AfterValidator(_proxies)] = ""
    cors_allowed_origins: Annotated[str, AfterValidator(_origins)] = ""
    client_timeout_sec: float = Field(default=30, gt=0, le=300)
    max_connections_per_address: int = Field(default=1000, ge=1, le=1_000_000)
    drain_sec: float = Field(default=5, ge=0, le=20)
    admin_wait_sec: float = Field(default=25, gt=0, le=300)
