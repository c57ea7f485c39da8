"""Settings of the gateway. An invalid setting stops the start with one line that names the variable."""

from pathlib import Path

import pytest

from gateway.settings import Settings
from gateway.web import rate_limit
from sandbox_broker.runtime.settings import load

GOOD = {
    "AMQP_URL": "amqp://guest:hidden@localhost/",
    "DATABASE_URL": "postgresql://user:hidden@localhost/x",
    "BROKER_API_TOKEN": "hidden-token-1,hidden-token-2",
    "BROKER_ADMIN_TOKEN": "hidden-token-3",
}


@pytest.fixture(autouse=True)
def good_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # a directory without .env
    for name in Settings.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)


def test_the_defaults_are_the_documented_values() -> None:
    settings = load(Settings)
    assert (settings.gateway_port, settings.allocate_timeout_sec, settings.admin_wait_sec) == (8080, 5, 25)
    assert (settings.rate_limit, settings.trusted_proxies) == (rate_limit.parse_rate("2000/5 minutes"), ())
    assert (settings.cors_allowed_origins, settings.client_timeout_sec, settings.drain_sec) == ((), 30, 5)
    assert (settings.docs_enabled, settings.ops_port, settings.bind_host) == (True, None, "")


def test_events_of_instruqt_are_off_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load(Settings)
    assert settings.instruqt_webhook_secret.get_secret_value() == ""
    assert settings.instruqt_end_events == ("track.completed", "track.stopped")
    assert not settings.instruqt_events_shadow
    monkeypatch.setenv("INSTRUQT_WEBHOOK_SECRET", "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw\n")
    monkeypatch.setenv("INSTRUQT_END_EVENTS", " track.over,track.left ")
    settings = load(Settings)
    assert settings.instruqt_end_events == ("track.over", "track.left")
    assert "MfKQ9r8G" not in repr(settings)


def test_an_empty_ops_port_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPS_PORT", "")
    assert load(Settings).ops_port is None
    monkeypatch.setenv("OPS_PORT", "9100")
    assert load(Settings).ops_port == 9100


def test_values_with_a_format_are_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RATE_LIMIT", " 3/minute ")
    monkeypatch.setenv("TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.9")
    monkeypatch.setenv("CORS_ALLOWED_ORIGINS", "https://a.example:443, http://localhost:3000")
    settings = load(Settings)
    assert settings.rate_limit == rate_limit.Rate(3, 60)
    assert list(map(str, settings.trusted_proxies)) == ["10.0.0.0/8", "192.0.2.9/32"]
    assert settings.cors_allowed_origins == ("https://a.example", "http://localhost:3000")


def test_empty_values_with_a_format_turn_the_feature_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RATE_LIMIT", "TRUSTED_PROXIES", "CORS_ALLOWED_ORIGINS"):
        monkeypatch.setenv(name, " ")
    settings = load(Settings)
    assert (settings.rate_limit, settings.trusted_proxies, settings.cors_allowed_origins) == (None, (), ())


def test_repr_contains_no_secret() -> None:
    assert "hidden" not in repr(load(Settings))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, None) for name in GOOD),
        ("BROKER_API_TOKEN", " , "),
        ("BROKER_ADMIN_TOKEN", ""),
        ("BROKER_API_TOKEN", "hidden-1234"),
        ("BROKER_API_TOKEN", "hidden-token-1,hidden-1234"),
        ("BROKER_API_TOKEN", "hidden-token-1,dev-track-token"),
        ("BROKER_ADMIN_TOKEN", "hidden-1234"),
        ("INSTRUQT_WEBHOOK_SECRET", "whsec_hidden"),
        ("INSTRUQT_END_EVENTS", " , "),
        ("BROKER_ADMIN_TOKEN", "dev-admin-token"),
        ("BROKER_ADMIN_TOKEN", "hidden-token-3, hidden-token-2"),
        ("AMQP_URL", "http://guest:hidden@localhost"),
        ("AMQP_URL", "amqp://guest:hidden@localhost:port/"),
        ("DATABASE_URL", "mysql://user:hidden@localhost/x"),
        ("GATEWAY_PORT", "0"),
        ("GATEWAY_PORT", "http"),
        ("OPS_PORT", "0"),
        ("OPS_PORT", "http"),
        ("OPS_PORT", "8080"),  # the default of GATEWAY_PORT
        ("BIND_HOST", "localhost"),
        ("ALLOCATE_TIMEOUT_SEC", "0"),
        ("ALLOCATE_TIMEOUT_SEC", "-1"),
        ("ALLOCATE_TIMEOUT_SEC", "nan"),
        ("ADMIN_WAIT_SEC", "soon"),
        ("RATE_LIMIT", "many"),
        ("RATE_LIMIT", "0/minute"),
        ("RATE_LIMIT", "2000"),
        ("RATE_LIMIT", "5/0 minutes"),
        ("RATE_LIMIT", "5/minute;1/second"),
        ("TRUSTED_PROXIES", "somewhere"),
        ("TRUSTED_PROXIES", "10.0.0.0/8, 10.0.0.0/99"),
        ("CORS_ALLOWED_ORIGINS", "labs.example.com"),
        ("CORS_ALLOWED_ORIGINS", "https://labs.example.com, https://labs.example.com/lab"),
        ("CORS_ALLOWED_ORIGINS", "*/lab"),
        ("CORS_ALLOWED_ORIGINS", "*, https://labs.example.com"),
        ("CLIENT_TIMEOUT_SEC", "0"),
        ("DRAIN_SEC", "-1"),
        ("DRAIN_SEC", "30"),
        ("DOCS_ENABLED", "perhaps"),
        ("LOG_LEVEL", "LOUD"),
    ],
)
def test_an_invalid_value_stops_the_start_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str | None
) -> None:
    if value is None:
        monkeypatch.delenv(name)
    else:
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stopped:
        load(Settings)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert name in line
    assert "hidden" not in line


def test_an_admin_token_must_not_be_a_track_token(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("BROKER_ADMIN_TOKEN", "hidden-token-2")
    with pytest.raises(SystemExit):
        load(Settings)
    assert capsys.readouterr().err == (
        "cannot start: BROKER_ADMIN_TOKEN: contains a token of BROKER_API_TOKEN, so every track could administer "
        "the broker; use another token\n"
    )
