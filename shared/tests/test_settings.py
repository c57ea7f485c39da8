"""Settings from the environment: problems are reported in one line without secrets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import Field

from sandbox_broker.csp.client import CspClient
from sandbox_broker.runtime.settings import EXAMPLE_TOKENS, CspSettings, CspUrl, DatabaseUrl, Port, Tokens, load

PASSWORD = "hunter2-7f3a"
GOOD = {
    "AMQP_URL": f"amqp://broker:{PASSWORD}@rabbit:5672/",
    "DATABASE_URL": f"postgresql://broker:{PASSWORD}@db:5432/broker",
    "BROKER_API_TOKEN": f"{PASSWORD}-a, {PASSWORD}-b",
    "CSP_API_TOKEN": f"{PASSWORD}-c",
}
OUTGOING = ("http_proxy", "https_proxy", "all_proxy", "no_proxy", "ssl_cert_file", "ssl_cert_dir")


class Settings(CspSettings):
    database_url: DatabaseUrl = Field(repr=False)
    broker_api_token: Tokens
    niosxaas_base_url: CspUrl = "https://csp.infoblox.com"
    gateway_port: Port = 8080
    delay_sec: float = Field(default=2, ge=0)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    monkeypatch.chdir(tmp_path)
    for name in (*Settings.model_fields, *OUTGOING):
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.delenv(name, raising=False)
    for name, value in GOOD.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


def refusal(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        load(Settings)
    assert stopped.value.code == 2
    line = capsys.readouterr().err
    assert line.endswith("\n")
    assert line.count("\n") == 1
    assert PASSWORD not in line
    return line


def test_valid_settings_are_loaded(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("DELAY_SEC", "0.01")
    environment.setenv("LOG_LEVEL", "DEBUG")
    settings = load(Settings)
    assert settings.amqp_url == GOOD["AMQP_URL"]
    assert (settings.delay_sec, settings.log_level, settings.gateway_port) == (0.01, "DEBUG", 8080)


@pytest.mark.parametrize("level", ["warning", "Warning", "WARNING"])
def test_the_log_level_may_be_in_any_case(environment: pytest.MonkeyPatch, level: str) -> None:
    environment.setenv("LOG_LEVEL", level)
    assert load(Settings).log_level == "WARNING"


@pytest.mark.parametrize("value", ["json", "JSON", "Console", " console\n"])
def test_the_log_format_may_be_in_any_case(environment: pytest.MonkeyPatch, value: str) -> None:
    environment.setenv("LOG_FORMAT", value)
    assert load(Settings).log_format == value.strip().lower()


@pytest.mark.parametrize("around", ["{}\n", "{}\r\n", " {} ", "\t{}\n\n"])
def test_blanks_and_line_ends_around_values_are_removed(environment: pytest.MonkeyPatch, around: str) -> None:
    values = {**GOOD, "CSP_BASE_URL": "https://csp.example/v2", "GATEWAY_PORT": "81", "LOG_LEVEL": "info"}
    for name, value in values.items():
        environment.setenv(name, around.format(value))
    settings = load(Settings)
    assert settings.amqp_url == values["AMQP_URL"]
    assert settings.database_url == values["DATABASE_URL"]
    assert settings.csp_api_token.get_secret_value() == values["CSP_API_TOKEN"]
    assert settings.broker_api_token.get_secret_value() == values["BROKER_API_TOKEN"]
    assert settings.csp_base_url == values["CSP_BASE_URL"]
    assert (settings.gateway_port, settings.log_level) == (81, "INFO")


def test_a_list_of_amqp_urls_is_normalized(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("AMQP_URL", " amqp://a/ ,\n amqp://b/v, \n")
    assert load(Settings).amqp_url == "amqp://a/,amqp://b/v"


@pytest.mark.parametrize(
    "no_proxy", ["localhost,10.0.0.0/8,fd00::/8", "[::1]", "[::1]:80, .example ,*.test", "fd00::/8 10.0.0.1"]
)
def test_networks_and_ipv6_addresses_in_no_proxy_are_accepted(
    environment: pytest.MonkeyPatch, no_proxy: str
) -> None:
    environment.setenv("HTTPS_PROXY", "http://127.0.0.1:9\n")
    environment.setenv("NO_PROXY", no_proxy)
    settings = load(Settings)
    CspClient(settings.csp_base_url, settings.csp_api_token.get_secret_value())


def test_a_proxy_that_is_not_used_may_be_invalid(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("ALL_PROXY", "socks5://proxy:1080")
    environment.setenv("NO_PROXY", "infoblox.com")
    load(Settings)
    environment.delenv("NO_PROXY")
    environment.setenv("HTTPS_PROXY", "proxy:3128")
    load(Settings)


def test_a_file_env_in_another_encoding_is_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    environment.delenv("AMQP_URL")
    (tmp_path / ".env").write_bytes("AMQP_URL=amqp://h/ä".encode("latin-1"))
    assert ".env" in refusal(capsys)


@pytest.mark.usefixtures("server_programs")
@pytest.mark.parametrize("service", ["gateway", "allocator", "reaper", "csp_syncer", "provisioner"])
def test_each_service_ends_with_one_line(service: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", service],
        env={
            "PATH": os.environ["PATH"],
            **GOOD,
            "BROKER_ADMIN_TOKEN": "an-administrator-token",
            "AMQP_URL": f"amqp://u:{PASSWORD}/4711@rabbit/",
            "DATABASE_URL": f"postgresql://u:{PASSWORD}/4711@localhost:5432/db",
            "SSL_CERT_FILE": "/nonexistent.pem",
            "LAB_DURATION_HOURS": "1e300",
            "GRACE_PERIOD_MINUTES": "inf",
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (2, "", 1)
    assert ended.stderr.startswith("cannot start: AMQP_URL: percent-encode special characters")
    assert ("DATABASE_URL: percent-encode" in ended.stderr) == (service in ("gateway", "allocator"))
    assert PASSWORD not in ended.stderr
    assert "4711" not in ended.stderr


@pytest.mark.parametrize("value", ["", "127.0.0.1", "127.0.0.1, ::1", "0.0.0.0,::"])
def test_bind_host_limits_the_addresses(environment: pytest.MonkeyPatch, value: str) -> None:
    assert load(Settings).bind_host == ""
    environment.setenv("BIND_HOST", value)
    assert load(Settings).bind_host == value


def test_a_file_named_env_is_read(environment: pytest.MonkeyPatch, tmp_path: Path) -> None:
    environment.delenv("AMQP_URL")
    (tmp_path / ".env").write_text("AMQP_URL=amqp://from-file/\nSOMETHING_ELSE=1\nGATEWAY_PORT=1\n")
    environment.setenv("GATEWAY_PORT", "2")
    assert load(Settings).amqp_url == "amqp://from-file/"
    assert load(Settings).gateway_port == 2


@pytest.mark.parametrize("name", list(GOOD))
def test_a_missing_value_is_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    environment.delenv(name)
    assert refusal(capsys) == f"cannot start: {name}: is not set\n"


@pytest.mark.parametrize("name", list(GOOD))
def test_an_empty_value_is_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    environment.setenv(name, "")
    assert f"{name}: " in refusal(capsys)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AMQP_URL", "rabbit:5672"),
        ("AMQP_URL", f"http://broker:{PASSWORD}@rabbit/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}@rabbit:port/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}@rabbit:99999/"),
        ("DATABASE_URL", f"mysql://broker:{PASSWORD}@db/broker"),
        ("DATABASE_URL", f"postgresql+psycopg2://broker:{PASSWORD}@db/broker"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@[db/broker"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}@a,b/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}@a/,amqp://b:port/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}@a..b/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}/x@rabbit/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}?x@rabbit/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}#x@rabbit/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}@x@rabbit/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD} x@rabbit/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}[x@rabbit/"),
        ("AMQP_URL", f"amqp://broker:{PASSWORD}\N{CARE OF}@rabbit/"),
        ("AMQP_URL", f"amqps://broker:{PASSWORD}@rabbit/?cafile=/nonexistent.pem"),
        ("AMQP_URL", f"amqps://broker:{PASSWORD}@rabbit/?ssl=true"),
        ("AMQP_URL", f"amqps://broker:{PASSWORD}@rabbit/?heartbeat=often"),
        ("AMQP_URL", f"amqps://broker:{PASSWORD}@rabbit/?auth=kerberos"),
        ("DATABASE_URL", f"postgresql://broker:4711{PASSWORD}/abc@localhost:5432/db"),
        ("DATABASE_URL", f"postgresql://broker:4711{PASSWORD}?abc@localhost:5432/db"),
        ("DATABASE_URL", f"postgresql://broker:4711{PASSWORD}#abc@localhost:5432/db"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@p@ss@host/db"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}]x@host/db"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}\N{CARE OF}@host/db"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@a:5432,b:x/db"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@db/broker?sslmode"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@db/broker?sslmode="),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@db/broker?sslmode=on"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@db/broker?sslmode=verify-full&sslrootcert=/nonexistent"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@db/broker?connect_timeout=5"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@db/broker?prepareThreshold=0"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@db/broker?pgbouncer=true"),
        ("DATABASE_URL", f"postgresql://broker:{PASSWORD}@db/broker?target_session_attrs=standby"),
        ("CSP_BASE_URL", "csp.infoblox.com"),
        ("CSP_BASE_URL", "https://csp.infoblox.com/v2?x=1"),
        ("CSP_BASE_URL", f"https://u:{PASSWORD}/x@csp.infoblox.com/v2"),
        ("CSP_BASE_URL", "https://csp..com/v2"),
        ("CSP_API_TOKEN", f"Token {PASSWORD}"),
        ("CSP_API_TOKEN", f"{PASSWORD}\n{PASSWORD}"),
        ("CSP_API_TOKEN", f"{PASSWORD}ä"),
        ("BROKER_API_TOKEN", f"{PASSWORD}\x7f{PASSWORD}"),
        ("OTEL_EXPORTER_OTLP_ENDPOINT", "collector:4318"),
        ("SSL_CERT_FILE", "/nonexistent.pem"),
        ("SSL_CERT_FILE", "/etc/hostname"),
        ("SSL_CERT_FILE", "/etc"),
        ("SSL_CERT_DIR", "/nonexistent"),
        ("HTTPS_PROXY", f"socks5://u:{PASSWORD}@proxy:1080"),
        ("HTTPS_PROXY", f"http://u:{PASSWORD}@proxy:port"),
        ("HTTPS_PROXY", f"http://u:{PASSWORD}/x@proxy"),
        ("HTTPS_PROXY", f"http://u:{PASSWORD}@x@proxy"),
        ("ALL_PROXY", "socks5h://proxy:1080"),
        ("https_proxy", f"ftp://u:{PASSWORD}@proxy"),
        ("BROKER_API_TOKEN", " , ,"),
        ("GATEWAY_PORT", "0"),
        ("GATEWAY_PORT", "65536"),
        ("GATEWAY_PORT", "http"),
        ("DELAY_SEC", "-1"),
        ("DELAY_SEC", "nan"),
        ("DELAY_SEC", "inf"),
        ("DELAY_SEC", PASSWORD),
        ("BIND_HOST", "localhost"),
        ("BIND_HOST", "127.0.0.1 ::1"),
        ("BIND_HOST", "127.0.0.1:8080"),
        ("BIND_HOST", "[::1]"),
        ("BIND_HOST", "10.0.0.0/8"),
        ("LOG_LEVEL", "LOUD"),
        ("LOG_FORMAT", "xml"),
    ],
)
def test_an_invalid_value_is_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, value: str
) -> None:
    environment.setenv(name, value)
    assert f"cannot start: {name}: " in refusal(capsys)


def test_all_problems_are_reported_together(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.delenv("AMQP_URL")
    environment.setenv("GATEWAY_PORT", "0")
    line = refusal(capsys)
    assert "AMQP_URL: is not set; " in line
    assert "GATEWAY_PORT: " in line


def test_a_process_with_an_invalid_setting_exits_with_2_and_one_line(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "sandbox_broker.migrate"],
        env={name: value for name, value in os.environ.items() if name != "DATABASE_URL"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (2, "", "cannot start: DATABASE_URL: is not set\n")


def test_secrets_are_not_shown() -> None:
    settings = load(Settings)
    for shown in (repr(settings), str(settings), f"{settings}", repr(settings.broker_api_token)):
        assert PASSWORD not in shown


def test_settings_are_frozen() -> None:
    settings = load(Settings)
    with pytest.raises(ValueError, match="frozen"):
        settings.gateway_port = 1  # type: ignore[misc]


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+asyncpg"])
def test_a_database_url_may_have_a_driver_name(environment: pytest.MonkeyPatch, scheme: str) -> None:
    environment.setenv("DATABASE_URL", f"{scheme}://broker:x@db:5432/broker?sslmode=require")
    assert load(Settings).database_url in (
        "postgresql://broker:x@db:5432/broker?sslmode=require",
        "postgres://broker:x@db:5432/broker?sslmode=require",
    )


def test_tokens_are_a_list() -> None:
    assert load(Settings).broker_api_token.get_secret_value().split(", ") == [f"{PASSWORD}-a", f"{PASSWORD}-b"]


@pytest.mark.parametrize("tokens", ["hunter2-7f3", f"{PASSWORD}-long-enough,hunter2-7f3"])
def test_a_short_token_is_refused_with_the_action(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: str
) -> None:
    environment.setenv("BROKER_API_TOKEN", tokens)
    assert refusal(capsys) == (
        "cannot start: BROKER_API_TOKEN: holds a token shorter than 12 characters; "
        "make a new one with `openssl rand -hex 24`\n"
    )


@pytest.mark.parametrize("token", sorted(EXAMPLE_TOKENS))
@pytest.mark.parametrize("name", ["BROKER_API_TOKEN", "CSP_API_TOKEN"])
def test_an_example_token_is_refused_with_the_action(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, token: str
) -> None:
    environment.setenv(name, token)
    line = refusal(capsys)
    assert line.startswith(f"cannot start: {name}: ")
    assert "an example token, which is public; " in line


@pytest.mark.parametrize("name", ["CSP_BASE_URL", "NIOSXAAS_BASE_URL"])
@pytest.mark.parametrize(
    "host", ["csp.example", "10.0.0.7:9200", "csp-simulator:9200", "localhost.example", "[fd00::1]"]
)
def test_an_unencrypted_csp_is_refused_with_the_action(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, host: str
) -> None:
    environment.setenv(name, f"http://{host}/v2")
    assert refusal(capsys) == (
        f"cannot start: {name}: must begin with https://, because CSP's credentials would travel unencrypted; "
        "for a simulator on a trusted network set ALLOW_INSECURE_CSP=true\n"
    )


@pytest.mark.parametrize(
    ("url", "allowed"),
    [
        ("https://csp.example/v2", ""),
        ("http://127.0.0.1:9200/v2", ""),
        ("http://127.9.8.7/v2", "false"),
        ("http://[::1]:9200/v2", ""),
        ("http://localhost:9200/v2", ""),
        ("http://csp.example/v2", "true"),
        ("http://csp.example/v2", "True"),
        ("http://csp-simulator:9200/v2", "csp-simulator"),
    ],
)
def test_an_encrypted_local_or_permitted_csp_is_accepted(
    environment: pytest.MonkeyPatch, url: str, allowed: str
) -> None:
    environment.setenv("CSP_BASE_URL", url)
    environment.setenv("ALLOW_INSECURE_CSP", allowed)
    assert load(Settings).csp_base_url == url


@pytest.mark.parametrize("allowed", ["csp-simulator", "false", "", "ture"])
def test_the_permission_applies_to_one_host_only(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], allowed: str
) -> None:
    environment.setenv("CSP_BASE_URL", "http://csp.example/v2")
    environment.setenv("ALLOW_INSECURE_CSP", allowed)
    assert refusal(capsys).startswith("cannot start: CSP_BASE_URL: must begin with https://")


def test_a_permission_that_is_a_url_is_named(
    environment: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    environment.setenv("ALLOW_INSECURE_CSP", "http://csp-simulator:9200")
    assert "ALLOW_INSECURE_CSP: must be true, false, or one host name" in refusal(capsys)
