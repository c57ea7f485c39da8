from collections.abc import Callable
from pathlib import Path

import pytest

from devstack.errors import CannotRun
from devstack.settings import Settings

pytest_plugins = ("devstack.fixtures",)

SettingsFrom = Callable[..., Settings]


def test_the_environment_overrides_the_file_and_the_file_overrides_the_defaults(
    settings_from: SettingsFrom, tmp_path: Path
) -> None:
    (tmp_path / ".env").write_text(
        "GATEWAY_PORT=8090\nREAPER_PORT=9999\nBROKER_API_TOKEN=from-file\nLOG_FORMAT=json\n"
    )

    settings = settings_from(GATEWAY_PORT="8091")

    assert settings.ports["GATEWAY_PORT"] == 8091
    assert settings.ports["REAPER_PORT"] == 9999
    assert settings.ports["ALLOCATOR_PORT"] == 9101
    assert settings.tokens["BROKER_API_TOKEN"] == "from-file"
    assert settings.environment["LOG_FORMAT"] == "json"


def test_an_empty_variable_counts_as_unset_but_is_passed_to_the_services(settings_from: SettingsFrom) -> None:
    settings = settings_from(DATABASE_URL="", GATEWAY_PORT="", RATE_LIMIT="")

    assert settings.database_url is None
    assert settings.ports["GATEWAY_PORT"] == 8080
    assert settings.environment["RATE_LIMIT"] == ""


def test_only_missing_tokens_are_generated(settings_from: SettingsFrom) -> None:
    settings = settings_from(BROKER_ADMIN_TOKEN="mine")

    assert settings.generated_tokens == {"BROKER_API_TOKEN", "CSP_API_TOKEN", "CONSOLE_SECRET"}
    assert settings.tokens == {"BROKER_ADMIN_TOKEN": "mine"}


def test_services_listen_on_loopback_by_default(settings_from: SettingsFrom) -> None:
    assert settings_from().environment["BIND_HOST"] == "127.0.0.1,::1"
    assert settings_from().bind_hosts == ("127.0.0.1", "::1")
    assert settings_from(BIND_HOST="").bind_hosts == ("",)
    assert settings_from(BIND_HOST="127.0.0.1, 192.0.2.1").bind_hosts == ("127.0.0.1", "192.0.2.1")
    with pytest.raises(CannotRun, match="BIND_HOST must be empty or contain 127"):
        settings_from(BIND_HOST="192.0.2.1")


def test_a_real_csp_requires_a_token(settings_from: SettingsFrom) -> None:
    with pytest.raises(CannotRun, match="CSP_API_TOKEN is not set"):
        settings_from(CSP_BASE_URL="https://csp.example/v2")


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "8080.0"])
def test_an_invalid_port_is_reported_with_its_variable(settings_from: SettingsFrom, port: str) -> None:
    with pytest.raises(CannotRun, match="GATEWAY_PORT must be a port"):
        settings_from(GATEWAY_PORT=port)


def test_the_simulator_and_each_real_csp_have_separate_databases(settings_from: SettingsFrom) -> None:
    simulated = settings_from().database_name
    real = settings_from(CSP_BASE_URL="https://csp.example/v2", CSP_API_TOKEN="t").database_name

    assert simulated != real
    assert settings_from().database_name == simulated


def test_libpq_variables_set_the_address_and_user_of_postgresql(settings_from: SettingsFrom) -> None:
    settings = settings_from(PGHOST="db.example", PGPORT="5433", PGUSER="me", PGPASSWORD="p@ss/word")

    assert settings.postgres_servers == ("postgresql://me:p%40ss%2Fword@db.example:5433",)


def test_the_default_superuser_is_tried_first(settings_from: SettingsFrom) -> None:
    assert settings_from().postgres_servers[0] == "postgresql://postgres@127.0.0.1:5432"


def test_a_cluster_is_started_only_without_named_servers(settings_from: SettingsFrom) -> None:
    assert settings_from(CLUSTER="1").cluster
    assert not settings_from().cluster
    with pytest.raises(CannotRun, match="remove AMQP_URL"):
        settings_from(CLUSTER="1", AMQP_URL="amqp://127.0.0.1/")
    with pytest.raises(CannotRun, match="CLUSTER must be 1"):
        settings_from(CLUSTER="yes")
