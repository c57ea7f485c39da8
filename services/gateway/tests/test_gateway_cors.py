"""Cross-origin requests of browser pages."""

import pytest

from gateway.routes import track
from gateway.web import cors

from .gateway_harness import STUDENT, TRACK, client, create_app_without_servers, detail

PAGE = "https://labs.example.com"
OTHER = "https://evil.example.com"
EXPOSED = {
    "X-Request-ID",
    "Retry-After",
    "X-RateLimit-Limit",
    "X-RateLimit-Remaining",
    "X-RateLimit-Reset",
    "Deprecation",
}
SENT = "authorization, x-instruqt-sandbox-id, x-instruqt-track-id, x-sandbox-name-prefix, idempotency-key"
PREFLIGHT = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": SENT,
}

# Method, path, headers, body, and expected status without an allocator.
REQUESTS: list[tuple[str, str, dict[str, str], bytes, int]] = [
    ("POST", "/v1/allocate", STUDENT, b"", 503),
    ("POST", "/v1/allocate", {}, b"", 401),
    ("POST", "/v1/allocate", TRACK, b"", 400),
    ("POST", "/v1/allocate", STUDENT, b"x" * 70_000, 413),
    ("POST", "/v1/sandboxes/1/mark-for-deletion", STUDENT, b"", 503),
    ("GET", "/v1/admin/stats", TRACK, b"", 403),
    ("GET", "/v1/nothing-here", STUDENT, b"", 404),
    ("PUT", "/v1/allocate", STUDENT, b"", 405),
    ("OPTIONS", "/v1/allocate", STUDENT, b"", 405),
    ("GET", "/v1/openapi.json", {}, b"", 200),
    ("GET", "/healthz", {}, b"", 200),
]


@pytest.mark.parametrize(("method", "path", "headers", "body", "status"), REQUESTS)
async def test_a_page_of_an_allowed_origin_can_read_every_response(
    method: str, path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    app = create_app_without_servers(cors_allowed_origins=f"https://else.example.com, {PAGE}")
    async with client(app) as http:
        response = await http.request(method, path, headers={**headers, "Origin": PAGE}, content=body)
        other_origin = await http.request(method, path, headers={**headers, "Origin": OTHER}, content=body)
    assert response.status_code == other_origin.status_code == status
    assert response.headers["Access-Control-Allow-Origin"] == PAGE
    assert set(response.headers["Access-Control-Expose-Headers"].split(", ")) >= EXPOSED
    assert "Access-Control-Allow-Origin" not in other_origin.headers
    for answer in (response, other_origin):
        assert "Origin" in answer.headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in answer.headers
        assert answer.headers["X-Request-ID"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_a_page_can_read_a_rate_limit_error() -> None:
    app = create_app_without_servers(cors_allowed_origins=PAGE, rate_limit="1/hour")
    async with client(app) as http:
        answers = [await http.post("/v1/allocate", headers={**STUDENT, "Origin": PAGE}) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [503, 429]
    assert answers[1].headers["Access-Control-Allow-Origin"] == PAGE
    assert answers[1].headers["Retry-After"]


async def test_a_page_can_read_an_internal_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def crash(*_: object, **__: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(track, "request_allocator", crash)
    async with client(create_app_without_servers(cors_allowed_origins=PAGE)) as http:
        response = await http.post("/v1/allocate", headers={**STUDENT, "Origin": PAGE})
    assert (response.status_code, detail(response)["code"]) == (500, "INTERNAL_ERROR")
    assert response.headers["Access-Control-Allow-Origin"] == PAGE


@pytest.mark.parametrize("path", ["/v1/allocate", "/v1/sandboxes/1/mark-for-deletion", "/v1/admin/sync"])
async def test_a_preflight_requires_no_token_and_is_not_rate_limited(path: str) -> None:
    app = create_app_without_servers(cors_allowed_origins=PAGE, rate_limit="1/hour")
    async with client(app) as http:
        for _ in range(3):
            response = await http.options(path, headers=PREFLIGHT)
            assert response.status_code == 200
        allowed = response.headers
        assert allowed["Access-Control-Allow-Origin"] == PAGE
        assert "POST" in allowed["Access-Control-Allow-Methods"].split(", ")
        headers = {name.lower() for name in allowed["Access-Control-Allow-Headers"].split(", ")}
        assert headers >= set(SENT.split(", "))
        assert "Access-Control-Allow-Credentials" not in allowed
        assert allowed["X-Request-ID"]
        assert allowed["X-Frame-Options"] == "DENY"
        assert (await http.post("/v1/allocate", headers={**STUDENT, "Origin": PAGE})).status_code == 503


@pytest.mark.parametrize(
    "wrong",
    [
        {"Origin": OTHER},
        {"Origin": "null"},
        {"Origin": PAGE + ".evil.example.com"},
        {"Access-Control-Request-Method": "DELETE"},
        {"Access-Control-Request-Headers": "x-anything"},
    ],
)
async def test_a_preflight_that_is_not_allowed_gets_the_error_body(wrong: dict[str, str]) -> None:
    async with client(create_app_without_servers(cors_allowed_origins=PAGE)) as http:
        response = await http.options("/v1/allocate", headers={**PREFLIGHT, **wrong})
    assert (response.status_code, detail(response)["code"]) == (400, "CORS_REFUSED")
    assert "CORS_ALLOWED_ORIGINS" in detail(response)["message"]
    assert "Access-Control-Allow-Origin" not in response.headers


async def test_a_star_allows_every_origin_without_credentials() -> None:
    async with client(create_app_without_servers(cors_allowed_origins="*")) as http:
        answers = [
            await http.options("/v1/allocate", headers={**PREFLIGHT, "Origin": OTHER}),
            await http.post("/v1/allocate", headers={**STUDENT, "Origin": OTHER, "Cookie": "a=b"}),
        ]
    assert [answer.status_code for answer in answers] == [200, 503]
    for answer in answers:
        assert answer.headers["Access-Control-Allow-Origin"] == "*"
        assert "Access-Control-Allow-Credentials" not in answer.headers


async def test_without_allowed_origins_no_cors_header_is_sent() -> None:
    async with client(create_app_without_servers(cors_allowed_origins=" , ")) as http:
        preflight = await http.options("/v1/allocate", headers=PREFLIGHT)
        response = await http.post("/v1/allocate", headers={**STUDENT, "Origin": PAGE})
    assert (preflight.status_code, response.status_code) == (405, 503)
    for answer in (preflight, response):
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_origins_are_normalized_to_the_notation_of_browsers() -> None:
    listed = "https://Labs.Example.com, http://localhost:3000,,https://a.example:443 , http://[::1]:8080"
    assert cors.parse_origins(listed) == [
        "https://labs.example.com",
        "http://localhost:3000",
        "https://a.example",
        "http://[::1]:8080",
    ]
    assert cors.parse_origins("*") == ["*"]
    assert cors.parse_origins("") == []


@pytest.mark.parametrize(
    "listed",
    [
        "labs.example.com",
        "//labs.example.com",
        "ftp://labs.example.com",
        "https://",
        "https://labs.example.com/",
        "https://labs.example.com/lab",
        "https://labs.example.com?lab=1",
        "https://labs.example.com#top",
        "https://user@labs.example.com",
        "https://labs.example.com:port",
        "https://labs.example.com:99999",
        "https://labs.example.com:0443",
        "https://*.example.com",
        "https://läbs.example.com",
        "https://labs example.com",
        "*/",
        "**",
        "*, https://labs.example.com",
        "null",
    ],
)
def test_an_invalid_origin_is_refused(listed: str) -> None:
    with pytest.raises(ValueError, match=r"origin"):
        cors.parse_origins(listed)
