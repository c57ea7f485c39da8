from typing import Annotated

from pydantic import AfterValidator, Field

from gateway import addresses, limits
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


class Settings(ServiceSettings):
    database_url: DatabaseUrl = Field(repr=False)
    broker_api_token: Tokens
    broker_admin_token: Tokens
    gateway_port: Port = 8080
    allocate_timeout_sec: float = Field(default=5, gt=0, le=60)
    rate_limit: Annotated[str, AfterValidator(_rate)] = "2000/5 minutes"
    trusted_proxies: Annotated[str, AfterValidator(_proxies)] = ""
    admin_wait_sec: float = Field(default=25, gt=0, le=300)
