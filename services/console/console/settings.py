from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, model_validator
from pydantic_settings import NoDecode

from sandbox_broker.runtime.settings import HttpUrl, Port, ProcessSettings, Tokens, none_if_empty

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")
"""From the fewest rights to the most."""


def _strip_path(value: str) -> str:
    return value.rstrip("/").removesuffix("/v1")


def _parse_roles(value: object) -> object:
    """Return pairs of a group and its role from text like `broker-admins=admin, instructors=viewer`."""
    if not isinstance(value, str):
        return value
    pairs = [part.strip().rpartition("=") for part in value.split(",") if part.strip()]
    if any(not group or role not in ROLES for group, _, role in pairs):
        raise ValueError(
            "must be a list like broker-admins=admin, instructors=viewer; roles: viewer, operator, admin"
        )
    return tuple((group.strip(), role) for group, _, role in pairs)


NO_SECRET = SecretStr("")


class Settings(ProcessSettings):
    console_port: Port = 9105
    console_url: Annotated[HttpUrl, AfterValidator(lambda value: value.rstrip("/"))] = "http://127.0.0.1:9105"
    """Address of the console in a browser."""
    broker_api_url: Annotated[HttpUrl, AfterValidator(_strip_path)] = "http://127.0.0.1:8080"
    """Address of the gateway, with or without /v1."""
    console_secret: Tokens
    """Secrets that encrypt the session cookie. The first one encrypts, all of them decrypt."""
    console_session_hours: float = Field(default=8, gt=0, le=168)
    max_console_streams: int = Field(default=100, ge=0, le=10_000)
    """Open pages with live updates."""

    oidc_issuer: Annotated[HttpUrl | None, BeforeValidator(none_if_empty)] = None
    oidc_client_id: str = ""
    oidc_client_secret: SecretStr = NO_SECRET
    oidc_groups_claim: str = "groups"
    oidc_roles: Annotated[tuple[tuple[str, Role], ...], NoDecode, BeforeValidator(_parse_roles)] = ()
    """Role of each group of the identity provider."""
    console_viewer_token: SecretStr = NO_SECRET
    """Token of the gateway for people with the role viewer, signed in with OpenID Connect."""
    console_operator_token: SecretStr = NO_SECRET
    console_admin_token: SecretStr = NO_SECRET

    @property
    def is_behind_tls(self) -> bool:
        return urlsplit(self.console_url).scheme == "https"

    def token_of_role(self, role: Role) -> str:
        """Return the token for people with this role, empty if it is not set."""
        tokens = {
            "viewer": self.console_viewer_token,
            "operator": self.console_operator_token,
            "admin": self.console_admin_token,
        }
        return tokens[role].get_secret_value()

    @model_validator(mode="after")
    def _check_oidc(self) -> Self:
        if self.oidc_issuer is None:
            return self
        if not self.oidc_client_id or not self.oidc_client_secret.get_secret_value():
            raise ValueError("OIDC_CLIENT_ID and OIDC_CLIENT_SECRET must be set with OIDC_ISSUER")
        if not self.oidc_roles:
            raise ValueError(
                "OIDC_ROLES must be set with OIDC_ISSUER, like broker-admins=admin, instructors=viewer"
            )
        for role in sorted({role for _, role in self.oidc_roles}):
            if not self.token_of_role(role):
                raise ValueError(
                    f"CONSOLE_{role.upper()}_TOKEN must be set, because OIDC_ROLES gives the role {role}"
                )
        return self
