"""Parser of AMQP_URL and DATABASE_URL with one or several servers."""

import pytest

from sandbox_broker.runtime import server_urls

SECRET = "hunter2"


@pytest.mark.parametrize(
    ("value", "urls"),
    [
        ("amqp://h/", ["amqp://h/"]),
        ("amqp://u:a,b@h/v,w", ["amqp://u:a,b@h/v,w"]),
        ("amqp://u:p@a/,amqps://u:p@b:5671/", ["amqp://u:p@a/", "amqps://u:p@b:5671/"]),
        ("amqp://a/ ,\n ,amqp://b/v", ["amqp://a/", "amqp://b/v"]),
    ],
)
def test_an_amqp_url_is_a_list_of_urls(value: str, urls: list[str]) -> None:
    assert server_urls.split_amqp_urls(value) == urls


@pytest.mark.parametrize(
    ("url", "server"),
    [
        ("amqp://h", "h:5672"),
        ("amqps://u@h/", "h:5671"),
        ("amqp://u:p@[fd00::1]:1234/v", "[fd00::1]:1234"),
        ("amqp://u:p:q@h:/v?heartbeat=5", "h:5672"),
    ],
)
def test_each_amqp_url_has_one_server(url: str, server: str) -> None:
    assert str(server_urls.amqp_host(url)) == server


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://h", "h:5432"),
        ("postgres://u:p@a:1,b,[::1]:2/db", "a:1,b:5432,[::1]:2/db"),
        ("postgresql://u:p%2C%40@a,b:7/db?target_session_attrs=read-write", "a:5432,b:7/db"),
        ("postgresql://u@%2Frun%2Fpostgresql/db", "/run/postgresql:5432/db"),
    ],
)
def test_a_database_url_has_several_hosts(url: str, shown: str) -> None:
    assert server_urls.format_database(url) == shown


@pytest.mark.parametrize("rest", ["a/b", "a?b", "a#b", "a@b", "a@b/c", "a@b?c=@", "1/@"])
def test_an_unescaped_password_is_reported_without_a_part_of_it(rest: str) -> None:
    for check, scheme in ((server_urls.amqp_host, "amqp"), (server_urls.split_database_url, "postgresql")):
        with pytest.raises(ValueError, match=r"^percent-encode special characters") as caught:
            check(f"{scheme}://u:{SECRET}{rest}@localhost:5432/db")
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["", "h:1", "u:hunter2@h", "//h", "http://h", "amqp://", "amqp://u:hunter2@", "amqp://u:hunter2@h:port/",
     "amqp://h:65536/", "amqp://h:0/", "amqp://[h/", "amqp://h]/", "amqp://a,b/", "amqp://a,/"],
)  # fmt: skip
def test_an_invalid_amqp_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^(must be a URL like|has several hosts)") as caught:
        server_urls.amqp_host(url)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["postgresql://", "postgresql://a,,b/", "postgresql://a:1,b:x/", "postgresql:///db", "mysql://h/"]
)
def test_an_invalid_database_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"^must be a URL like"):
        server_urls.split_database_url(url)


def test_every_password_is_found() -> None:
    assert list(server_urls.passwords("amqp://u:first%2F@a/,amqp://u:second@b/,amqp://guest:guest@c/")) == [
        "first/",
        "second",
    ]
    assert list(server_urls.passwords("postgresql://u:first@a:1,b:2/db?sslpassword=second&sslmode=require")) == [
        "first",
        "second",
    ]
