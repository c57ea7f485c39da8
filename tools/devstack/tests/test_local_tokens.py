import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from dotenv import dotenv_values

from devstack import local_tokens
from devstack.settings import TOKENS, Settings
from sandbox_broker.runtime.settings import EXAMPLE_TOKENS, MIN_TOKEN_LENGTH

pytest_plugins = ("devstack.fixtures",)

SettingsFrom = Callable[..., Settings]


def file_mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_tokens_are_random_and_valid_for_the_services(settings_from: SettingsFrom, tmp_path: Path) -> None:
    tokens = local_tokens.add_generated_tokens(settings_from()).tokens
    assert set(tokens) == set(TOKENS)
    assert len(set(tokens.values())) == len(TOKENS)
    assert all(len(token) >= MIN_TOKEN_LENGTH for token in tokens.values())
    assert EXAMPLE_TOKENS.isdisjoint(tokens.values())
    (tmp_path / ".devstack" / "tokens.env").unlink()
    assert set(local_tokens.add_generated_tokens(settings_from()).tokens.values()).isdisjoint(tokens.values())


def test_tokens_are_stored_for_the_next_run_readable_by_the_owner_only(
    settings_from: SettingsFrom, tmp_path: Path
) -> None:
    first = local_tokens.add_generated_tokens(settings_from())
    assert file_mode(tmp_path / ".devstack" / "tokens.env") == 0o600
    assert local_tokens.add_generated_tokens(settings_from()).tokens == first.tokens


def test_a_token_set_by_the_user_is_not_written_to_disk(settings_from: SettingsFrom, tmp_path: Path) -> None:
    settings = local_tokens.add_generated_tokens(settings_from(BROKER_API_TOKEN="a-token-of-the-user"))
    assert settings.tokens["BROKER_API_TOKEN"] == "a-token-of-the-user"
    assert "a-token-of-the-user" not in (tmp_path / ".devstack" / "tokens.env").read_text()


def test_a_missing_token_is_added_and_the_others_are_kept(settings_from: SettingsFrom, tmp_path: Path) -> None:
    (tmp_path / ".devstack").mkdir()
    (tmp_path / ".devstack" / "tokens.env").write_text("BROKER_API_TOKEN=of-an-earlier-run\nCSP_API_TOKEN=\n")
    tokens = local_tokens.add_generated_tokens(settings_from()).tokens
    assert tokens["BROKER_API_TOKEN"] == "of-an-earlier-run"
    assert tokens["CSP_API_TOKEN"]
    assert local_tokens.add_generated_tokens(settings_from()).tokens == tokens


def test_the_brokerctl_file_has_the_address_and_a_generated_token(
    settings_from: SettingsFrom, tmp_path: Path
) -> None:
    settings = local_tokens.add_generated_tokens(settings_from(GATEWAY_PORT="8091"))
    local_tokens.write_brokerctl_file(settings)
    path = tmp_path / ".devstack" / "brokerctl.env"
    assert file_mode(path) == 0o600
    assert dotenv_values(path) == {
        "BROKER_API_URL": "http://127.0.0.1:8091/v1",
        "BROKER_ADMIN_TOKEN": settings.tokens["BROKER_ADMIN_TOKEN"],
    }


@pytest.mark.parametrize("has_file", [True, False])
def test_the_brokerctl_file_has_no_token_set_by_the_user(
    settings_from: SettingsFrom, tmp_path: Path, has_file: bool
) -> None:
    if has_file:
        local_tokens.write_brokerctl_file(local_tokens.add_generated_tokens(settings_from()))
    local_tokens.write_brokerctl_file(
        local_tokens.add_generated_tokens(settings_from(BROKER_ADMIN_TOKEN="of the user"))
    )
    assert not (tmp_path / ".devstack" / "brokerctl.env").exists()
