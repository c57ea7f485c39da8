"""Redaction hides secrets in every encoding and leaves other text unchanged."""

import json
from urllib.parse import quote

import pytest
from pydantic import Field, SecretStr

from sandbox_broker.observability.redaction import Redaction, secrets_of
from sandbox_broker.runtime.settings import DatabaseUrl, ServiceSettings, Tokens

AWKWARD = "pä\"ss/w\\ord'1"
JWT = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJhZGEifQ.c2lnbmF0dXJl"


class Settings(ServiceSettings):
    database_url: DatabaseUrl = Field(repr=False)
    broker_api_token: Tokens
    niosxaas_password: SecretStr


SETTINGS = Settings(
    _env_file=None,
    amqp_url="amqp://guest:guest@rabbit/",
    database_url=f"postgresql://broker:{quote(AWKWARD, safe='')}@db/broker?sslpassword=of-the-key",
    broker_api_token=SecretStr("first-track-token, second-track-token"),
    niosxaas_password=SecretStr("with, a comma"),
)


@pytest.mark.parametrize(
    "secret", [AWKWARD, "first-track-token", "second-track-token", "with, a comma", "of-the-key"]
)
@pytest.mark.parametrize(
    "written", [str, json.dumps, repr, lambda text: quote(text, safe=""), lambda text: json.dumps(repr(text))]
)
def test_every_form_of_a_secret_setting_is_hidden(secret: str, written: object) -> None:
    assert callable(written)
    line = f"before {written(secret)} after"
    redaction = Redaction(secrets_of(SETTINGS))
    for redacted in (redaction.of_text(line), redaction.of_bytes(line.encode()).decode()):
        assert written(secret).strip("\"'") not in redacted
        assert secret not in redacted
        assert redacted.startswith("before ")
        assert redacted.endswith(" after")


@pytest.mark.parametrize(
    ("line", "redacted"),
    [
        (f'{{"error": "answered {JWT}"}}', '{"error": "answered ***"}'),
        ("amqp://somebody:hunter2hunter2@rabbit:5672/", "amqp://somebody:***@rabbit:5672/"),
        ("{'Authorization': 'Token 0123456789abcdef'}", "{'Authorization': 'Token ***'}"),
        ("Authorization: Bearer abc.def-ghi~jkl+/=", "Authorization: Bearer ***"),
        ("Basic dXNlcjpwYXNzd29yZA==", "Basic ***"),
    ],
)
def test_text_that_looks_like_a_secret_is_hidden(line: str, redacted: str) -> None:
    redaction = Redaction(())
    assert redaction.of_text(line) == redacted
    assert redaction.of_bytes(line.encode()) == redacted.encode()


@pytest.mark.parametrize(
    "line",
    [
        '{"event": "lease.granted", "request_id": "5f0c2b9e-8f1b-4c57-9a39-0c5f0a1f7d11", "holder": "läb"}',
        "http://127.0.0.1:8080/v1/docs at 2026-11-26T09:00:00Z",
        "guest is the user of this developer's RabbitMQ",
        "This token is not known here.",
        "",
    ],
)
def test_a_line_without_secrets_is_unchanged(line: str) -> None:
    redaction = Redaction(secrets_of(SETTINGS))
    assert redaction.of_text(line) == line
    assert redaction.of_bytes(line.encode()) == line.encode()


def test_short_values_are_not_hidden() -> None:
    assert Redaction(["a", "csp"]).of_text("a csp") == "a csp"
