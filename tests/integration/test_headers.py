"""Request headers with unusual values, sent over raw connections."""

import re
from itertools import count, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.integration import hypothesis_settings, wire
from tests.integration.stack import ADMIN_TOKEN, TRACK_TOKEN, Stack

STUDENT, STUDENT_OLD = b"X-Instruqt-Sandbox-ID", b"X-Track-ID"
LAB, PREFIX, KEY = b"X-Instruqt-Track-ID", b"X-Sandbox-Name-Prefix", b"Idempotency-Key"
HEADERS = (STUDENT, STUDENT_OLD, LAB, PREFIX, KEY)
TOKEN = (b"Authorization", f"Bearer {TRACK_TOKEN}".encode())

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# Sandbox names with special characters of SQL, patterns and shells.
SPECIAL_NAMES = ["100%", "a_b-", "axb-", "back\\slash-", "quo'te-", 'quo"te-', "*-", "[a-z]-", "$1-", "ü-", "LAB-"]

numbers = count()


def new_student(name: str = "student") -> tuple[bytes, bytes]:
    """Return the header of a student without a lease."""
    return STUDENT, f"{name}-{next(numbers)}".encode()


async def allocate(stack: Stack, *headers: tuple[bytes, bytes]) -> wire.Response:
    return await wire.send_request(stack.url, wire.build_request("POST", "/v1/allocate", [TOKEN, *headers]))


def header_values(*more: bytes) -> st.SearchStrategy[bytes]:
    """Return a strategy for header values of any bytes except CR and LF, partly too long."""
    special = [b" ", b"\t", b"\x00", b"\x1b", b"\x7f", b"\xff", "ü日本".encode(), b"x" * 127, b"x" * 1024, *more]
    anything = st.binary(max_size=8).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
    # At most 10 KiB, so that the request head stays within its limit of 16 KiB.
    return st.lists(st.one_of(st.sampled_from(special), anything, st.just(b"x")), max_size=10).map(b"".join)


def expected_error(value: bytes) -> str | None:
    """Return the error code for a header value, or None for a valid or blank value."""
    if any((byte < 0x20 and byte != 0x09) or byte == 0x7F for byte in value):
        return "MALFORMED_REQUEST"  # not a valid field line
    value = value.strip(b" \t")
    return "INVALID_HEADER" if len(value) > 128 or re.search(rb"[^\x20-\x7e]", value) else None


@hypothesis_settings.with_seed
@given(name=st.sampled_from(HEADERS), value=header_values())
@example(STUDENT, b"x" * 8192)
@example(STUDENT, b"x" * 128)
@example(STUDENT, b"x" * 129)
@example(STUDENT, b" \t " + b"x" * 128 + b" \t ")
@example(STUDENT_OLD, b"\t")
@example(PREFIX, b"nul\x00")
@example(KEY, b"\xa0")
@hypothesis_settings.build_settings(60)
@pytest.mark.timeout(hypothesis_settings.TIMEOUT_SEC)
async def test_any_header_value_is_accepted_or_refused_by_its_rule(stack: Stack, name: bytes, value: bytes) -> None:
    headers = [(name, value)] if name in (STUDENT, STUDENT_OLD) else [new_student(), (name, value)]
    response = await allocate(stack, *headers)
    blank = not value.strip(b" \t")
    if (code := expected_error(value)) is not None:
        assert response.error == (400, code)
    elif name in (STUDENT, STUDENT_OLD) and blank:
        assert response.error == (400, "MISSING_SANDBOX_ID")
    else:
        # Later cases find an empty pool, a prefix without a match, or the key of another student.
        assert response.error in (
            (200, None),
            (201, None),
            (409, "POOL_EXHAUSTED"),
            (409, "IDEMPOTENCY_KEY_CONFLICT"),
        )


@hypothesis_settings.with_seed
@given(prefix=header_values(*(name[:2].encode() for name in SPECIAL_NAMES)))
@example(b"%")
@example(b"_")
@example(b"\\")
@example(b"a_")
@example(b"100%")
@example(b"back\\")
@example(b"quo'")
@example(b'quo"')
@example(b"' OR name LIKE '%")
@example(b"[a-z]")
@example(b"$1")
@example(b"LAB")
@example(b"\x00")
@hypothesis_settings.build_settings(60)
@pytest.mark.timeout(hypothesis_settings.TIMEOUT_SEC)
async def test_a_prefix_matches_exactly_the_names_that_start_with_it(stack: Stack, prefix: bytes) -> None:
    await create_special_names(stack)
    expected_prefix = prefix.strip(b" \t").decode("latin-1")
    rows = await stack.database.fetch("SELECT name FROM sandboxes WHERE status = 'available'")
    matching = {row["name"] for row in rows if row["name"].startswith(expected_prefix)}
    response = await allocate(stack, new_student(), (PREFIX, prefix))
    if (code := expected_error(prefix)) is not None:
        assert response.error == (400, code)
    elif matching:
        assert response.error == (201, None)
        assert response.json["name"] in matching
    else:
        assert response.error == (409, "POOL_EXHAUSTED")
        assert expected_prefix in response.json["detail"]["message"]


async def create_special_names(stack: Stack) -> None:
    """Create sandboxes of each name again when one of the names is used up."""
    left = await stack.database.fetchval("SELECT count(DISTINCT available_stem) FROM sandboxes")
    if left < len(SPECIAL_NAMES):
        for name_prefix in SPECIAL_NAMES:
            await stack.control("POST", "accounts", {"count": 3, "name_prefix": name_prefix})
        assert (await stack.sync()).status_code == 200


async def test_a_repeated_header_is_refused_in_any_case(stack: Stack) -> None:
    for name, second in product(HEADERS, (b"same", b"other", b"")):
        for spelling in (name, name.lower(), name.upper()):
            headers = [(name, b"same"), (spelling, second)]
            if name not in (STUDENT, STUDENT_OLD):
                headers.append(new_student())
            response = await allocate(stack, *headers)
            assert response.error == (400, "INVALID_HEADER"), headers
            assert f"{name.decode()} was sent more than once" in response.json["detail"]["message"]
    assert (await stack.stats())["allocated"] == 0


async def test_two_authorization_headers_are_refused(stack: Stack) -> None:
    for second in (b"Bearer wrong", f"Bearer {ADMIN_TOKEN}".encode(), TOKEN[1], b""):
        for tokens in ([TOKEN, (b"authorization", second)], [(b"AUTHORIZATION", second), TOKEN]):
            response = await wire.send_request(
                stack.url, wire.build_request("POST", "/v1/allocate", [*tokens, new_student()])
            )
            assert response.error == (401, "UNAUTHORIZED"), tokens
    assert (await stack.stats())["allocated"] == 0


async def test_only_a_valid_token_is_accepted(stack: Stack) -> None:
    valid = [TOKEN[1], TOKEN[1] + b" \t", b"bearer  \t" + TRACK_TOKEN.encode()]  # surrounding blanks are ignored
    invalid = [
        b"",
        b"Bearer",
        b"Bearer \t",
        b"Bearer " + b"x" * 8192,
        b"Bearer \xff\xfe",
        "Bearer tökén".encode(),
        b"Bearer%20" + TRACK_TOKEN.encode(),
        b"Token " + TRACK_TOKEN.encode(),
        TOKEN[1] + b"\xa0",
        TOKEN[1] + b", " + TOKEN[1],
        TOKEN[1].upper(),
    ]
    for value in [*valid, *invalid]:
        request = wire.build_request("POST", "/v1/allocate", [(b"Authorization", value), new_student()])
        response = await wire.send_request(stack.url, request)
        assert response.error == ((201, None) if value in valid else (401, "UNAUTHORIZED")), value
        assert response.headers.get("WWW-Authenticate") == (None if value in valid else "Bearer")


async def test_control_characters_are_refused_in_any_header(stack: Stack) -> None:
    names = (*HEADERS, b"Authorization", b"X-Request-ID", b"X-Foreign")
    values = (b"a\r\n b", b"a\rb", b"a\nb", b"a\nX-Evil: yes", b"a\r\n\tb", b"\x00", b"\x0b", b"\x7f")
    for name, value in product(names, values):
        response = await allocate(stack, new_student(), (name, value))
        assert response.error == (400, "MALFORMED_REQUEST"), (name, value)
        assert "X-Evil" not in response.headers
    assert (await stack.stats())["allocated"] == 0


async def test_an_invalid_request_id_is_replaced(stack: Stack) -> None:
    for value in (b"x" * 129, b"x" * 8192, b"two words", b"\xff", "ü".encode(), b"<b>", b"%0d%0aX-Evil:1"):
        response = await allocate(stack, new_student(), (b"X-Request-ID", value))
        assert response.status == 201
        assert UUID.fullmatch(response.headers["X-Request-ID"]), value


async def test_all_valid_characters_are_kept_unchanged(stack: Stack) -> None:
    every_character = bytes(range(0x21, 0x7F)) + b" " + bytes(range(0x21, 0x42))
    assert len(every_character) == 128
    backwards = every_character[::-1]
    lease = await allocate(stack, (STUDENT, every_character), (LAB, backwards), (KEY, every_character))
    assert lease.status == 201
    path = f"/v1/sandboxes/{lease.json['sandbox_id']}"
    sandbox = await wire.send_request(
        stack.url, wire.build_request("GET", path, [TOKEN, (STUDENT, every_character)])
    )
    assert sandbox.json["allocated_to_track"].encode() == every_character
    assert sandbox.json["track_name"].encode() == backwards
    repeated = await allocate(stack, (STUDENT, every_character), (KEY, every_character))
    assert (repeated.status, repeated.json) == (200, lease.json)
    other = await allocate(stack, new_student(), (KEY, every_character))
    assert other.error == (409, "IDEMPOTENCY_KEY_CONFLICT")
    stranger = await wire.send_request(
        stack.url, wire.build_request("GET", path, [TOKEN, (STUDENT, every_character.swapcase())])
    )
    assert stranger.error == (403, "NOT_SANDBOX_OWNER")


async def test_many_foreign_headers_are_accepted_up_to_the_limit_of_a_head(stack: Stack) -> None:
    others = [(b"X-Other-%d" % number, b"x" * 256) for number in range(50)]
    assert (await allocate(stack, new_student(), *others)).status == 201
    others = [(b"X-Other-%d" % number, b"x" * 8192) for number in range(50)]
    assert (await allocate(stack, new_student(), *others)).error == (431, "HEADERS_TOO_LARGE")


async def test_an_unusual_sandbox_id_is_not_found(stack: Stack) -> None:
    sandbox_ids = (
        "%00",
        "%ff%fe",
        "%ed%a0%80",
        "%25",
        "_",
        "%27%20OR%201=1",
        "x" * 8192,
        "%0d%0aX-Evil:1",
        "%C3%BC",
    )
    for sandbox_id, (method, end) in product(sandbox_ids, (("GET", ""), ("POST", "/mark-for-deletion"))):
        request = wire.build_request(method, f"/v1/sandboxes/{sandbox_id}{end}", [TOKEN, new_student()])
        response = await wire.send_request(stack.url, request)
        assert response.error == (404, "SANDBOX_NOT_FOUND"), (method, sandbox_id)
        assert "X-Evil" not in response.headers
