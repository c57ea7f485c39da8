from collections.abc import Callable
from typing import Annotated

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import NoDecode

from gateway.web import cors, rate_limit, webhook_signature
from gateway.web.client_address import Network, parse_networks
from gateway.web.rate_limit import Rate
from sandbox_broker.runtime.settings import (
    AccessKeyList,
    DatabaseSettings,
    HttpUrl,
    Port,
    Tokens,
    none_if_empty,
    split_tokens,
)

MIN_PEPPER_LENGTH = 24


def _parsed_by(parse: Callable[[str], object]) -> BeforeValidator:
    """Return a validator that parses text. The default of a field is a parsed value."""
    return BeforeValidator(lambda value: parse(value) if isinstance(value, str) else value)


def _parse_rate(value: str) -> Rate | None:
    return rate_limit.parse_rate(value.strip()) if value.strip() else None


def _parse_proxies(value: str) -> tuple[Network, ...]:
    try:
        return tuple(parse_networks(value))
    except ValueError as error:
        raise ValueError(f"must be a comma-separated list of addresses and networks: {error}") from error


def _parse_origins(value: str) -> tuple[str, ...]:
    try:
        return tuple(cors.parse_origins(value))
    except ValueError as error:
        raise ValueError(f"must be a comma-separated list of origins, or only *: {error}") from error


def _parse_names(value: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in value.split(",") if part.strip())
    if not names:
        raise ValueError("must hold at least one event type, like track.completed")
    return names


def _check_peppers(value: SecretStr) -> SecretStr:
    if any(len(pepper) < MIN_PEPPER_LENGTH for pepper in split_tokens(value)):
        raise ValueError(
            f"holds a pepper shorter than {MIN_PEPPER_LENGTH} characters; make one with `openssl rand -hex 24`"
        )
    return value


def _validate_ops_port(value: int | None, info: ValidationInfo) -> int | None:
    if value is not None and value == info.data.get("gateway_port"):
        raise ValueError("must differ from GATEWAY_PORT")
    return value


class Settings(DatabaseSettings):
    broker_api_token: Tokens
    broker_admin_token: Tokens
    token_pepper: Annotated[SecretStr, AfterValidator(_check_peppers)] = SecretStr("")
    """Keys of the hashes of named tokens, comma-separated; the first is for new tokens. Empty: hashes without a
    key, which is safe because a token has 256 random bits."""
    gateway_port: Port = 8080
    ops_port: Annotated[Port | None, BeforeValidator(none_if_empty), AfterValidator(_validate_ops_port)] = None
    """Port of /healthz, /readyz and /metrics. None: they use `gateway_port`."""
    allocate_timeout_sec: float = Field(default=5, gt=0, le=60)
    rate_limit: Annotated[Rate | None, NoDecode, _parsed_by(_parse_rate)] = Rate(2000, window_sec=300)
    students_per_address_alert: Annotated[Rate | None, NoDecode, _parsed_by(_parse_rate)] = Rate(
        1000, window_sec=600
    )
    """Students of one client address that are not unusual: a class of 300 with three plays each. None: no count."""
    trusted_proxies: Annotated[tuple[Network, ...], NoDecode, _parsed_by(_parse_proxies)] = ()
    docs_enabled: bool = True
    cors_allowed_origins: Annotated[tuple[str, ...], NoDecode, _parsed_by(_parse_origins)] = ()
    client_timeout_sec: float = Field(default=30, gt=0, le=300)
    max_connections_per_address: int = Field(default=1000, ge=1, le=1_000_000)
    drain_sec: float = Field(default=5, ge=0, le=20)
    max_event_streams: int = Field(default=100, ge=0, le=10_000)
    admin_wait_sec: float = Field(default=25, gt=0, le=300)
    access_keys: AccessKeyList = SecretStr("")
    """Keys that decrypt the passwords of logins inside sandboxes. Empty: no logins."""
    access_login_url: HttpUrl = "https://csp.infoblox.com"

    instruqt_webhook_secret: Annotated[SecretStr, AfterValidator(webhook_signature.check_secrets)] = SecretStr("")
    """Signing secrets of Instruqt's webhooks, comma-separated. Empty: the route for events is off."""
    instruqt_end_events: Annotated[tuple[str, ...], NoDecode, _parsed_by(_parse_names)] = (
        "track.completed",
        "track.stopped",
    )
    """Event types that end a play."""
    instruqt_events_shadow: bool = False
    """True: count and log the events, and end no lease."""

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
