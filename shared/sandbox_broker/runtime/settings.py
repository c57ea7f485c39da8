"""Settings from environment variables or a `.env` file. An invalid setting stops the service with one line."""

import re
import sys
from typing import Annotated, Literal, NoReturn, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from sandbox_broker.runtime import proxy
from sandbox_broker.runtime.access_keys import parse_access_keys
from sandbox_broker.runtime.proxy import is_loopback
from sandbox_broker.runtime.server_urls import (
    amqp_host,
    check_amqp_options,
    check_database_options,
    parse_host,
    split_amqp_urls,
    split_database_url,
    split_url,
)
from sandbox_broker.runtime.sockets import parse_addresses

MIN_TOKEN_LENGTH = 12

EXAMPLE_TOKENS = frozenset({"dev-track-token", "dev-admin-token", "dev-csp-token"})
"""The fixed tokens of `make run` in earlier versions. They are public, so every service refuses them."""

_NEW_TOKEN = "make a new one with `openssl rand -hex 24`"  # noqa: S105 (not a password)


_HTTP_EXAMPLE = "https://host/path"


def _http_url(value: str) -> str:
    _, _, host, rest = split_url(value, ("http", "https"), _HTTP_EXAMPLE)
    parse_host(host, 443, _HTTP_EXAMPLE)
    if "?" in rest:
        raise ValueError(f"must be a URL like {_HTTP_EXAMPLE}, without ?")
    return value


def _amqp_urls(value: str) -> str:
    """Return the URLs, separated by one comma each."""
    urls = split_amqp_urls(value.rstrip(", \n"))
    for url in urls:
        amqp_host(url)
        check_amqp_options(url)
    return ",".join(urls)


def _database_url(value: str) -> str:
    split_database_url(value)
    check_database_options(value)
    return value


def _driver_neutral(value: str) -> str:
    """Remove the driver name of SQLAlchemy, because asyncpg does not accept it."""
    return value.replace("postgresql+asyncpg://", "postgresql://", 1)


def none_if_empty(value: object) -> object:
    """Return None for an empty string, because Compose passes unset variables as empty strings."""
    return None if value == "" else value


def _to_upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _to_lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


def split_tokens(listed: SecretStr) -> list[str]:
    """Return the tokens of a comma-separated list, without surrounding blanks."""
    return [part.strip() for part in listed.get_secret_value().split(",") if part.strip()]


def _check_token_list(value: SecretStr) -> SecretStr:
    tokens = split_tokens(value)
    if not tokens:
        raise ValueError("must hold at least one token")
    if not all(token.isprintable() for token in tokens):
        raise ValueError("holds a token with a line end or another control character")
    if any(len(token) < MIN_TOKEN_LENGTH for token in tokens):
        raise ValueError(f"holds a token shorter than {MIN_TOKEN_LENGTH} characters; {_NEW_TOKEN}")
    if not EXAMPLE_TOKENS.isdisjoint(tokens):
        raise ValueError(f"holds an example token, which is public; {_NEW_TOKEN}")
    return value


def _check_csp_token(value: SecretStr) -> SecretStr:
    if value.get_secret_value() in EXAMPLE_TOKENS:
        raise ValueError("is an example token, which is public; set the token that CSP issued")
    if not re.fullmatch("[!-~]+", value.get_secret_value()):
        raise ValueError("must be the token alone: printable ASCII without spaces")
    return value


def _check_access_keys(value: SecretStr) -> SecretStr:
    parse_access_keys(value)
    return value


def _normalize_insecure_csp(value: str) -> str:
    text = value.lower()
    if text in ("", "false", "0", "no", "off"):
        return ""
    if text in ("true", "1", "yes", "on"):
        return "true"
    if "/" in text or "," in text:
        raise ValueError("must be true, false, or one host name")
    return text


def _require_tls(value: str, info: ValidationInfo) -> str:
    parts = urlsplit(value)
    host = parts.hostname or ""
    allowed = info.data.get("allow_insecure_csp", "")
    if parts.scheme == "https" or is_loopback(host) or allowed in ("true", host):
        return value
    raise ValueError(
        "must begin with https://, because CSP's credentials would travel unencrypted; "
        "for a simulator on a trusted network set ALLOW_INSECURE_CSP=true"
    )


def _addresses(value: str) -> str:
    try:
        parse_addresses(value)
    except ValueError as error:
        raise ValueError("must be a comma-separated list of IP addresses like 127.0.0.1,::1, or empty") from error
    return value


DatabaseUrl = Annotated[
    str,
    AfterValidator(_driver_neutral),
    AfterValidator(_database_url),
]
"""A URL with one host, or several hosts separated by commas."""
AmqpUrl = Annotated[str, AfterValidator(_amqp_urls)]
"""One URL for each node of the RabbitMQ cluster, separated by commas."""
HttpUrl = Annotated[str, AfterValidator(_http_url)]
CspUrl = Annotated[HttpUrl, AfterValidator(_require_tls)]
"""A URL of CSP. http:// needs a loopback host or `allow_insecure_csp`, a field that must come before this one."""
CspToken = Annotated[SecretStr, AfterValidator(_check_csp_token)]
Tokens = Annotated[SecretStr, AfterValidator(_check_token_list)]
"""A comma-separated list of tokens, so that tokens can be rotated without downtime."""

AccessKeyList = Annotated[SecretStr, AfterValidator(_check_access_keys)]
"""A comma-separated list of Fernet keys. Empty: no logins."""

Port = Annotated[int, Field(ge=1, le=65535)]


class EnvironmentSettings(BaseSettings):
    """Settings from the environment. A field name is the name of its environment variable in lower case."""

    model_config = SettingsConfigDict(
        env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _strip(cls, values: dict[str, object]) -> dict[str, object]:
        """Remove blanks and line ends around the values, which a secret from a file often has. A password keeps its
        blanks."""
        return {
            name: value.strip("\r\n" if "password" in name else None) if isinstance(value, str) else value
            for name, value in values.items()
        }


class ProcessSettings(EnvironmentSettings):
    """Settings of every process with an HTTP port and a log."""

    bind_host: Annotated[str, AfterValidator(_addresses)] = ""
    """Listening addresses of the service. Empty for all addresses, IPv4 and IPv6."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_to_upper)] = "INFO"
    log_format: Annotated[Literal["json", "console"], BeforeValidator(_to_lower)] = "json"
    otel_exporter_otlp_endpoint: Annotated[HttpUrl | None, BeforeValidator(none_if_empty)] = None
    otel_traces_sampler_arg: float = Field(default=0.01, ge=0, le=1)


class ServiceSettings(ProcessSettings):
    """Settings of a service that uses RabbitMQ."""

    amqp_url: AmqpUrl = Field(repr=False)


class DatabaseSettings(ServiceSettings):
    """Settings of a service that uses the database."""

    database_url: DatabaseUrl = Field(repr=False)


class CspSettings(ServiceSettings):
    """Settings of a service that calls CSP."""

    allow_insecure_csp: Annotated[str, AfterValidator(_normalize_insecure_csp)] = ""
    """Empty: https:// only. `true`: http:// to any host. Otherwise the only host that may be called with http://."""
    csp_base_url: CspUrl = "https://csp.infoblox.com/v2"
    csp_api_token: CspToken

    @model_validator(mode="after")
    def _check_network(self) -> Self:
        proxy.check_trust()
        for name in type(self).model_fields:
            if name.endswith("_base_url"):
                proxy.find_proxy(getattr(self, name))
        return self


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S]) -> S:
    """Return the settings from the environment. Exit with status 2 and one line if a setting is invalid."""
    try:
        return settings()
    except (OSError, UnicodeError):
        stop("the file .env cannot be read, or is not UTF-8")
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        stop("; ".join(_describe(problem["loc"], problem["msg"]) for problem in problems))


def stop(line: str) -> NoReturn:
    """Exit with status 2 and one line for the operator."""
    sys.stderr.write(f"cannot start: {' '.join(line.split())}\n")
    raise SystemExit(2)


def _describe(location: tuple[int | str, ...], message: str) -> str:
    """Return the variable and its problem. The message of a check of several settings names the variable itself."""
    advice = "is not set" if message == "Field required" else message.removeprefix("Value error, ")
    return f"{str(location[0]).upper()}: {advice}" if location else advice
