"""Choice of the proxy for an outgoing call."""

import pytest

from sandbox_broker.runtime.proxy import find_proxy, is_loopback

CSP = "https://csp.infoblox.com/v2"
PROXY = "http://proxy:3128"


@pytest.mark.parametrize("host", ["localhost", "a.localhost", "127.0.0.1", "127.9.8.7", "::1", "::ffff:127.0.0.1"])
def test_this_machine_is_never_called_through_a_proxy(host: str) -> None:
    url = f"http://[{host}]:9200/" if ":" in host else f"http://{host}:9200/"
    assert is_loopback(host)
    assert find_proxy(url, {"HTTP_PROXY": PROXY, "ALL_PROXY": PROXY}) is None


@pytest.mark.parametrize(
    ("environ", "proxy"),
    [
        ({}, None),
        ({"HTTP_PROXY": PROXY}, None),
        ({"HTTPS_PROXY": PROXY}, PROXY),
        ({"HTTPS_PROXY": f"{PROXY}\n"}, PROXY),
        ({"HTTPS_PROXY": f"{PROXY}/"}, PROXY),
        ({"HTTPS_PROXY": "proxy:3128"}, PROXY),
        ({"ALL_PROXY": PROXY, "HTTPS_PROXY": ""}, PROXY),
        ({"https_proxy": PROXY, "HTTPS_PROXY": "http://other"}, PROXY),
        ({"HTTPS_PROXY": "http://u:p%40@proxy:3128"}, "http://u:p%40@proxy:3128"),
        ({"HTTPS_PROXY": PROXY, "ALL_PROXY": "socks5://other"}, PROXY),
    ],
)
def test_the_variable_of_the_scheme_wins(environ: dict[str, str], proxy: str | None) -> None:
    assert find_proxy(CSP, environ) == proxy


@pytest.mark.parametrize(
    ("url", "no_proxy", "excluded"),
    [
        (CSP, "*", True),
        (CSP, "infoblox.com", True),
        (CSP, ".infoblox.com", True),
        (CSP, "*.infoblox.com", True),
        (CSP, "INFOBLOX.com", True),
        (CSP, "csp.infoblox.com:443", False),
        ("https://csp.infoblox.com:443/", "csp.infoblox.com:443", True),
        (CSP, "oblox.com,com.infoblox", False),
        (CSP, "10.0.0.0/8,fd00::/8,[::1]", False),
        ("https://10.1.2.3/", "192.168.0.0/16 10.0.0.0/8", True),
        ("https://11.1.2.3/", "10.0.0.0/8", False),
        ("https://[fd00::7]/", "fd00::/8", True),
        ("https://[fd00::7]/", "[fd00::7]", True),
        ("https://[fd00::7]:8443/", "[fd00::7]:8443", True),
        ("https://[fd00::7]:8443/", "[fd00::7]:443", False),
        (CSP, ", ,[,]:,:443,300.0.0.0/8,fd00::/999", False),
    ],
)
def test_no_proxy_lists_domains_addresses_and_networks(url: str, no_proxy: str, excluded: bool) -> None:
    assert (find_proxy(url, {"HTTPS_PROXY": PROXY, "NO_PROXY": no_proxy}) is None) == excluded
