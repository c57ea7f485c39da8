"""Configuration from the environment and from files."""

import sys
from pathlib import Path

import pytest

from brokerctl.config import DEFAULT_URL, checkout_config_file, load_config
from brokerctl.errors import Misconfigured

TOKEN = {"BROKER_ADMIN_TOKEN": "secret"}


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


@pytest.mark.parametrize(
    ("value", "url"),
    [
        ("", DEFAULT_URL),
        ("https://broker.example.com", "https://broker.example.com"),
        ("https://broker.example.com/v1", "https://broker.example.com"),
        ("https://broker.example.com/v1/", "https://broker.example.com"),
        ("http://10.0.0.7:8080/broker/v1", "http://10.0.0.7:8080/broker"),
    ],
)
def test_url_may_end_with_v1_as_for_the_instruqt_scripts(tmp_path: Path, value: str, url: str) -> None:
    assert load_config(None, {**TOKEN, "BROKER_API_URL": value, "HOME": str(tmp_path)}).url == url


@pytest.mark.parametrize(
    "value",
    ["broker.example.com", "ftp://broker.example.com", "http://", "http://a:b/", "http://a:0/", "http://a:70000/",
     "http://u:hunter2@a/", "http://u:hunter2/x@a/", "http://u:hunter2#x@a/", "http://a?hunter2@b", "http://a b/"],
)  # fmt: skip
def test_invalid_url_is_refused_without_a_secret(tmp_path: Path, value: str) -> None:
    with pytest.raises(Misconfigured, match="BROKER_API_URL") as caught:
        load_config(None, {**TOKEN, "BROKER_API_URL": value, "HOME": str(tmp_path)})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("token", ["hunter2\nhunter2", "hunter2\x7f", "hunter2ä"])
def test_a_token_that_no_header_can_carry_is_refused_without_it(tmp_path: Path, token: str) -> None:
    with pytest.raises(Misconfigured, match="BROKER_ADMIN_TOKEN") as caught:
        load_config(None, {"BROKER_ADMIN_TOKEN": token, "HOME": str(tmp_path)})
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://127.0.0.1:8080", "http://127.3.2.1", "http://[::1]:1", "http://localhost"])
def test_a_gateway_on_this_machine_is_never_called_through_a_proxy(tmp_path: Path, url: str) -> None:
    proxies = {"HTTP_PROXY": "http://127.0.0.1:9", "http_proxy": "socks5://u:p@ss@proxy"}
    assert load_config(None, {**TOKEN, **proxies, "BROKER_API_URL": url, "HOME": str(tmp_path)}).proxy is None


@pytest.mark.parametrize(
    ("proxy", "used"),
    [("http://proxy:3128\n", "http://proxy:3128"), ("proxy:3128", "http://proxy:3128"), ("", None),
     ("http://u:p%40@[fd00::1]:3128/", "http://u:p%40@[fd00::1]:3128/")],
)  # fmt: skip
def test_another_gateway_is_called_through_the_proxy(tmp_path: Path, proxy: str, used: str | None) -> None:
    environ = {**TOKEN, "HTTPS_PROXY": proxy, "BROKER_API_URL": "https://broker.example.com", "HOME": str(tmp_path)}
    config = load_config(None, environ)
    assert config.proxy == used
    assert "p%40" not in repr(config)


@pytest.mark.parametrize(
    "proxy",
    ["socks5://u:hunter2@proxy", "http://u:hunter2@proxy:port", "http://u:hunter2/x@proxy", "http://u@hunter2@p"],
)
def test_an_invalid_proxy_is_refused_without_a_secret(tmp_path: Path, proxy: str) -> None:
    environ = {**TOKEN, "https_proxy": proxy, "BROKER_API_URL": "https://broker.example.com", "HOME": str(tmp_path)}
    with pytest.raises(Misconfigured, match=r"^https_proxy must be like") as caught:
        load_config(None, environ)
    assert "hunter2" not in str(caught.value)


def test_environment_wins_over_the_file(tmp_path: Path) -> None:
    file = write_lines(
        tmp_path / "broker.env", "# ours", "BROKER_API_URL=https://file.example.com", "BROKER_ADMIN_TOKEN='of file'"
    )
    config = load_config(file, {"BROKER_API_URL": "https://environment.example.com"})
    assert (config.url, config.token) == ("https://environment.example.com", "of file")


def test_default_file_is_in_the_users_configuration_folder(tmp_path: Path) -> None:
    (tmp_path / ".config").mkdir()
    write_lines(tmp_path / ".config" / "brokerctl.env", "BROKER_ADMIN_TOKEN=of user")
    assert load_config(None, {"HOME": str(tmp_path)}).token == "of user"
    other = tmp_path / "other"
    other.mkdir()
    write_lines(other / "brokerctl.env", "BROKER_ADMIN_TOKEN=of other")
    assert load_config(None, {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(other)}).token == "of other"


def test_first_token_of_a_list_is_used_and_not_shown_in_repr(tmp_path: Path) -> None:
    config = load_config(None, {"BROKER_ADMIN_TOKEN": " one , two", "HOME": str(tmp_path)})
    assert config.token == "one"
    assert "one" not in repr(config)


def test_missing_token_or_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="BROKER_ADMIN_TOKEN is not set"):
        load_config(None, {"HOME": str(tmp_path)})
    with pytest.raises(Misconfigured, match="none does not exist"):
        load_config(tmp_path / "none", TOKEN)


def test_checkout_file_is_the_last_resort(tmp_path: Path) -> None:
    local = write_lines(
        tmp_path / "local.env", "BROKER_API_URL=http://127.0.0.1:8091/v1", "BROKER_ADMIN_TOKEN=local"
    )
    config = load_config(None, {"HOME": str(tmp_path)}, checkout_file=local)
    assert (config.url, config.token) == ("http://127.0.0.1:8091", "local")


@pytest.mark.parametrize("name", ["BROKER_API_URL", "BROKER_ADMIN_TOKEN"])
def test_token_of_checkout_never_goes_to_another_broker(tmp_path: Path, name: str) -> None:
    local = write_lines(
        tmp_path / "local.env", "BROKER_API_URL=http://127.0.0.1:8091/v1", "BROKER_ADMIN_TOKEN=local"
    )
    environ = {"HOME": str(tmp_path), name: "https://broker.example.com"}
    if name == "BROKER_API_URL":
        with pytest.raises(Misconfigured, match="BROKER_ADMIN_TOKEN is not set"):
            load_config(None, environ, checkout_file=local)
    else:
        assert load_config(None, environ, checkout_file=local).url == DEFAULT_URL


def test_file_of_user_wins_over_checkout_file(tmp_path: Path) -> None:
    local = write_lines(tmp_path / "local.env", "BROKER_ADMIN_TOKEN=local")
    (tmp_path / ".config").mkdir()
    write_lines(tmp_path / ".config" / "brokerctl.env", "BROKER_ADMIN_TOKEN=of user")
    assert load_config(None, {"HOME": str(tmp_path)}, checkout_file=local).token == "of user"


def test_checkout_file_is_beside_the_virtual_environment() -> None:
    assert checkout_config_file() == Path(sys.executable).parents[2] / ".devstack" / "brokerctl.env"
