import sys
from pathlib import Path

import pytest

from brokerctl.config import DEFAULT_URL, checkout_file, load
from brokerctl.problems import Misconfigured

TOKEN = {"BROKER_ADMIN_TOKEN": "secret"}


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("", DEFAULT_URL),
        ("https://broker.example.com", "https://broker.example.com"),
        ("https://broker.example.com/v1", "https://broker.example.com"),
        ("https://broker.example.com/v1/", "https://broker.example.com"),
        ("http://10.0.0.7:8080/broker/v1", "http://10.0.0.7:8080/broker"),
    ],
)
def test_the_address_is_that_of_the_scripts(tmp_path: Path, given: str, url: str) -> None:
    assert load(None, {**TOKEN, "BROKER_API_URL": given, "HOME": str(tmp_path)}).url == url


@pytest.mark.parametrize("given", ["broker.example.com", "ftp://broker.example.com", "http://", "http://a:b/"])
def test_what_is_no_address_is_told(tmp_path: Path, given: str) -> None:
    with pytest.raises(Misconfigured, match="BROKER_API_URL"):
        load(None, {**TOKEN, "BROKER_API_URL": given, "HOME": str(tmp_path)})


def test_the_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = write(
        tmp_path / "broker.env", "# ours", "BROKER_API_URL=https://file.example.com", "BROKER_ADMIN_TOKEN='of file'"
    )
    found = load(file, {"BROKER_API_URL": "https://environment.example.com"})
    assert (found.url, found.token) == ("https://environment.example.com", "of file")


def test_without_a_file_named_that_of_the_user_is_read(tmp_path: Path) -> None:
    (tmp_path / ".config").mkdir()
    write(tmp_path / ".config" / "brokerctl.env", "BROKER_ADMIN_TOKEN=of user")
    assert load(None, {"HOME": str(tmp_path)}).token == "of user"
    other = tmp_path / "other"
    other.mkdir()
    write(other / "brokerctl.env", "BROKER_ADMIN_TOKEN=of other")
    assert load(None, {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(other)}).token == "of other"


def test_of_a_list_of_tokens_the_first_is_used_and_none_is_shown(tmp_path: Path) -> None:
    found = load(None, {"BROKER_ADMIN_TOKEN": " one , two", "HOME": str(tmp_path)})
    assert found.token == "one"
    assert "one" not in repr(found)


def test_a_missing_token_or_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="BROKER_ADMIN_TOKEN is not set"):
        load(None, {"HOME": str(tmp_path)})
    with pytest.raises(Misconfigured, match="There is no file"):
        load(tmp_path / "none", TOKEN)


def test_the_broker_of_the_checkout_is_found_where_nothing_else_is_set(tmp_path: Path) -> None:
    local = write(tmp_path / "local.env", "BROKER_API_URL=http://127.0.0.1:8091/v1", "BROKER_ADMIN_TOKEN=local")
    found = load(None, {"HOME": str(tmp_path)}, local_broker=local)
    assert (found.url, found.token) == ("http://127.0.0.1:8091", "local")


@pytest.mark.parametrize("name", ["BROKER_API_URL", "BROKER_ADMIN_TOKEN"])
def test_the_token_of_the_checkout_never_goes_to_another_broker(tmp_path: Path, name: str) -> None:
    local = write(tmp_path / "local.env", "BROKER_API_URL=http://127.0.0.1:8091/v1", "BROKER_ADMIN_TOKEN=local")
    environ = {"HOME": str(tmp_path), name: "https://broker.example.com"}
    if name == "BROKER_API_URL":
        with pytest.raises(Misconfigured, match="BROKER_ADMIN_TOKEN is not set"):
            load(None, environ, local_broker=local)
    else:
        assert load(None, environ, local_broker=local).url == DEFAULT_URL


def test_the_file_of_the_user_wins_over_that_of_the_checkout(tmp_path: Path) -> None:
    local = write(tmp_path / "local.env", "BROKER_ADMIN_TOKEN=local")
    (tmp_path / ".config").mkdir()
    write(tmp_path / ".config" / "brokerctl.env", "BROKER_ADMIN_TOKEN=of user")
    assert load(None, {"HOME": str(tmp_path)}, local_broker=local).token == "of user"


def test_the_checkout_is_that_of_the_virtual_environment() -> None:
    assert checkout_file() == Path(sys.executable).parents[2] / ".devstack" / "brokerctl.env"
