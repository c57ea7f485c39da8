"""Settings come from environment variables or a `.env` file; a wrong one stops the service with one line."""

import sys
from collections.abc import Callable
from typing import Annotated, Literal, NoReturn, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


def _url(*schemes: str, example: str) -> Callable[[str], str]:
    def check(value: str) -> str:
        try:
            parts = urlsplit(value)
            valid = parts.scheme in schemes and bool(parts.hostname)
            _ = parts.port  # raises on a port that is no number
        except ValueError:
            valid = False
        if not valid:
            raise ValueError(f"must be a URL like {example}")
        return value

    return check


def _driver_neutral(value: str) -> str:
    """asyncpg knows no SQLAlchemy driver names."""
    return value.replace("postgresql+asyncpg://", "postgresql://", 1)


def _none_if_empty(value: object) -> object:
    return None if value == "" else value


def _to_upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _tokens(value: SecretStr) -> SecretStr:
    if not any(part.strip() for part in value.get_secret_value().split(",")):
        raise ValueError("must hold at least one token")
    return value


DatabaseUrl = Annotated[
    str,
    AfterValidator(_driver_neutral),
    AfterValidator(_url("postgresql", "postgres", example="postgresql://user:password@host:5432/database")),
]
AmqpUrl = Annotated[str, AfterValidator(_url("amqp", "amqps", example="amqp://user:password@host:5672/"))]
HttpUrl = Annotated[str, AfterValidator(_url("http", "https", example="https://host/path"))]
Tokens = Annotated[SecretStr, AfterValidator(_tokens)]
"""A comma-separated list, so that a token is rotated without downtime."""

Port = Annotated[int, Field(ge=1, le=65535)]


class ServiceSettings(BaseSettings):
    """What every service has. The field names are the variables' names in lower case."""

    model_config = SettingsConfigDict(env_file=".env", extra="ignore", frozen=True, hide_input_in_errors=True)

    amqp_url: AmqpUrl = Field(repr=False)
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_to_upper)] = "INFO"
    log_format: Literal["json", "console"] = "json"
    otel_exporter_otlp_endpoint: Annotated[HttpUrl | None, BeforeValidator(_none_if_empty)] = None
    otel_traces_sampler_arg: float = Field(default=0.01, ge=0, le=1)


S = TypeVar("S", bound=BaseSettings)


def load(settings: type[S]) -> S:
    """The settings from the environment; exits with status 2 and one line that names what is wrong."""
    try:
        return settings()
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        stop("; ".join(f"{_variable(problem['loc'])}: {_advice(problem['msg'])}" for problem in problems))


def stop(line: str) -> NoReturn:
    """Ends the process with one line for the person who starts it."""
    sys.stderr.write(f"cannot start: {line}\n")
    raise SystemExit(2)


def _variable(location: tuple[int | str, ...]) -> str:
    return str(location[0]).upper() if location else "settings"


def _advice(message: str) -> str:
    return "is not set" if message == "Field required" else message.removeprefix("Value error, ")
