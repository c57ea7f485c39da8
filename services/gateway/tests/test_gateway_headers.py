"""Request headers of the track routes."""

from collections.abc import AsyncIterator

import pytest

from sandbox_broker.contract.commands import AllocateSandbox, Command, ReleaseSandbox
from sandbox_broker.contract.replies import Reply, StudentWaiting
from sandbox_broker.contract.types import MAX_SEC

from .gateway_harness import STUDENT, TRACK, Gateway, detail, raw, running

ROUTES = [
    ("POST", "/v1/allocate"),
    ("POST", "/v1/sandboxes/1/mark-for-deletion"),
    ("GET", "/v1/sandboxes/1"),
]
NEW, OLD = "X-Instruqt-Sandbox-ID", "X-Track-ID"
OPTIONAL = {
    "X-Instruqt-Track-ID": "track_name",
    "X-Sandbox-Name-Prefix": "name_prefix",
    "Idempotency-Key": "idempotency_key",
}
NOT_PRINTABLE_ASCII = [
    b"tab\tinside",
    b"nul\x00",
    b"escape\x1b[31m",
    b"delete\x7f",
    b"\x1c",
    "ümlaut".encode(),
    "ümlaut".encode("latin-1"),
    b"\xa0",
    b"no-break\xa0",
    b"\x85",
    "日本".encode(),
    b"\xff\xfe",
]


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


@pytest.mark.parametrize("headers", [{}, {NEW: ""}, {NEW: " "}, {NEW: "\t "}, {OLD: ""}, {OLD: "  "}])
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_missing_or_blank_student_id_is_400(
    gateway: Gateway, method: str, path: str, headers: dict[str, str]
) -> None:
    response = await gateway.client.request(method, path, headers={**TRACK, **headers})
    assert (response.status_code, detail(response)["code"]) == (400, "MISSING_SANDBOX_ID")
    assert NEW in detail(response)["message"]
    assert gateway.allocator.commands == []


@pytest.mark.parametrize("name", [NEW, OLD])
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_student_id_of_129_characters_is_400(gateway: Gateway, method: str, path: str, name: str) -> None:
    response = await gateway.client.request(method, path, headers={**TRACK, name: "x" * 129})
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_HEADER")
    assert name in detail(response)["message"]
    assert gateway.allocator.commands == []


@pytest.mark.parametrize("name", [NEW, OLD])
@pytest.mark.parametrize(("method", "path"), ROUTES)
async def test_a_student_id_that_looks_like_a_pseudonym_is_400(
    gateway: Gateway, method: str, path: str, name: str
) -> None:
    """The allocator would keep such an id after LEASE_PERSONAL_DAYS."""
    response = await gateway.client.request(method, path, headers={**TRACK, name: " forgotten-me "})
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_HEADER")
    assert name in detail(response)["message"]
    assert gateway.allocator.commands == []


@pytest.mark.parametrize("value", NOT_PRINTABLE_ASCII)
@pytest.mark.parametrize("name", [NEW, OLD, *OPTIONAL])
async def test_characters_outside_printable_ascii_are_400(gateway: Gateway, name: str, value: bytes) -> None:
    student = {} if name == OLD else {NEW: "student-1"}
    response = await gateway.client.post("/v1/allocate", headers=raw({**TRACK, **student, name: value}))
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_HEADER")
    assert name in detail(response)["message"]
    assert gateway.allocator.commands == []


@pytest.mark.parametrize("name", OPTIONAL)
async def test_an_optional_header_of_129_characters_is_400(gateway: Gateway, name: str) -> None:
    response = await gateway.client.post("/v1/allocate", headers={**STUDENT, name: "x" * 129})
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_HEADER")


async def test_128_printable_characters_are_forwarded_unchanged(gateway: Gateway) -> None:
    longest = ("".join(chr(code) for code in range(0x21, 0x7F)) * 2)[:128]
    response = await gateway.client.post(
        "/v1/allocate", headers={**TRACK, NEW: longest, **dict.fromkeys(OPTIONAL, longest)}
    )
    assert response.status_code == 201
    (command,) = gateway.allocator.commands
    assert isinstance(command, AllocateSandbox)
    assert command.holder == longest
    assert [getattr(command, field) for field in OPTIONAL.values()] == [longest] * 3


async def test_blanks_around_a_value_are_removed(gateway: Gateway) -> None:
    padded = f" \t{'x' * 128}\t "
    response = await gateway.client.post("/v1/allocate", headers={**TRACK, NEW: padded})
    assert response.status_code == 201
    (command,) = gateway.allocator.commands
    assert isinstance(command, AllocateSandbox)
    assert command.holder == "x" * 128


async def test_blank_optional_headers_count_as_absent(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/allocate", headers={**STUDENT, **dict.fromkeys(OPTIONAL, "  ")})
    assert response.status_code == 201
    (command,) = gateway.allocator.commands
    assert isinstance(command, AllocateSandbox)
    assert [getattr(command, field) for field in OPTIONAL.values()] == [None] * 3


async def test_wildcard_characters_in_a_prefix_have_no_meaning(gateway: Gateway) -> None:
    await gateway.client.post("/v1/allocate", headers={**STUDENT, "X-Sandbox-Name-Prefix": "a%_*\\'b"})
    (command,) = gateway.allocator.commands
    assert isinstance(command, AllocateSandbox)
    assert command.name_prefix == "a%_*\\'b"


async def test_the_old_header_works_and_is_marked_deprecated(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/allocate", headers={**TRACK, OLD: "old-student"})
    assert response.status_code == 201
    assert response.headers["Deprecation"] == "true"
    released = await gateway.client.post("/v1/sandboxes/7/mark-for-deletion", headers={**TRACK, OLD: "old-student"})
    assert released.headers["Deprecation"] == "true"
    allocate, release = gateway.allocator.commands
    assert isinstance(allocate, AllocateSandbox)
    assert isinstance(release, ReleaseSandbox)
    assert allocate.holder == release.holder == "old-student"


@pytest.mark.parametrize(("value", "code"), [("", "MISSING_SANDBOX_ID"), ("x" * 129, "INVALID_HEADER")])
async def test_errors_mark_the_old_header_as_deprecated_too(gateway: Gateway, value: str, code: str) -> None:
    response = await gateway.client.post("/v1/allocate", headers={**TRACK, OLD: value})
    assert (response.status_code, detail(response)["code"]) == (400, code)
    assert response.headers["Deprecation"] == "true"
    unknown = await gateway.client.get("/v1/sandboxes/unknown", headers={**TRACK, OLD: "old-student"})
    assert unknown.status_code == 404
    assert unknown.headers["Deprecation"] == "true"


async def test_the_new_header_takes_precedence(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/allocate", headers={**TRACK, OLD: "old", NEW: "new"})
    assert "Deprecation" not in response.headers
    (command,) = gateway.allocator.commands
    assert isinstance(command, AllocateSandbox)
    assert command.holder == "new"


async def test_a_blank_new_header_is_400_even_beside_the_old_header(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/allocate", headers={**TRACK, OLD: "old", NEW: " "})
    assert (response.status_code, detail(response)["code"]) == (400, "MISSING_SANDBOX_ID")
    assert "Deprecation" not in response.headers


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("value", ["student-1", "student-2"])
async def test_a_repeated_header_is_400_and_named(gateway: Gateway, method: str, path: str, value: str) -> None:
    twice = [*raw(STUDENT), (NEW.encode(), value.encode())]
    response = await gateway.client.request(method, path, headers=twice)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_HEADER")
    assert f"{NEW} was sent more than once" in detail(response)["message"]
    assert gateway.allocator.commands == []


async def test_other_headers_may_be_repeated(gateway: Gateway) -> None:
    via = [(b"via", b"1.1 a"), (b"via", b"1.1 b")]
    assert (await gateway.client.post("/v1/allocate", headers=[*raw(STUDENT), *via])).status_code == 201


@pytest.mark.parametrize(
    ("preferences", "wait_sec"),
    [
        ([], None),
        ([""], None),
        (["wait=30"], None),
        (["respond-async, wait=900"], 900),
        (["respond-async;wait=900"], MAX_SEC),
        (["RESPOND-ASYNC ,\tWait = 10"], 10),
        (['respond-async, wait="15"'], 15),
        (["respond-async; a=b; c, wait=20; d"], 20),
        (["wait=20", "respond-async"], 20),
        (["respond-async, wait=1, wait=2", "wait=3"], 1),
        (["respond-async, wait=0"], 0),
        (["respond-async"], MAX_SEC),
        (["respond-async, wait=-1"], MAX_SEC),
        (["respond-async, wait=soon"], MAX_SEC),
        (["respond-async, wait=" + "9" * 18], MAX_SEC),
        (["handling=lenient, return=minimal, respond-async, wait=5"], 5),
        (['quoted="a, respond-async, wait=1"'], None),
        (['quoted="a\\", respond-async'], None),
        (["respond-async-later, wait=5"], None),
        ([",,, respond-async,,wait=5,"], 5),
        (["\xff, respond-async, wait=5"], 5),
    ],
)
async def test_the_prefer_header_asks_for_a_place_in_the_waiting_line(
    gateway: Gateway, preferences: list[str], wait_sec: int | None
) -> None:
    headers = [*raw(STUDENT), *((b"Prefer", preference.encode("latin-1")) for preference in preferences)]
    assert (await gateway.client.post("/v1/allocate", headers=headers)).status_code == 201
    (command,) = gateway.allocator.commands
    assert isinstance(command, AllocateSandbox)
    assert command.wait_sec == wait_sec


async def test_a_waiting_student_gets_202_with_the_place_in_line(gateway: Gateway) -> None:
    async def wait(_: Command) -> Reply:
        return StudentWaiting(position=3, waiting_since=1728054123, estimated_wait_sec=None, retry_after=7)

    gateway.allocator.answer = wait
    response = await gateway.allocate(Prefer="respond-async, wait=900")
    assert response.status_code == 202
    assert response.json() == {
        "status": "waiting",
        "position": 3,
        "waiting_since": 1728054123,
        "estimated_wait_sec": None,
        "retry_after": 7,
    }
    assert response.headers["Retry-After"] == "7"
    assert response.headers["Preference-Applied"] == "respond-async"
