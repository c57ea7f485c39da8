"""Headers as they come over the wire, past any client that would refuse to send them."""

import re
from itertools import count, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests.integration import hypothesis_settings, wire
from tests.integration.stack import ADMIN_TOKEN, TRACK_TOKEN, Stack

STUDENT, STUDENT_OLD = b"X-Instruqt-Sandbox-ID", b"X-Track-ID"
LAB, PREFIX, KEY = b"X-Instruqt-Track-ID", b"X-Sandbox-Name-Prefix", b"Idempotency-Key"
OURS = (STUDENT, STUDENT_OLD, LAB, PREFIX, KEY)
TOKEN = (b"Authorization", f"Bearer {TRACK_TOKEN}".encode())

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

# Names in the pool that are full of what means something to SQL, to a pattern or to a shell.
STRANGE_NAMES = ["100%", "a_b-", "axb-", "back\\slash-", "quo'te-", 'quo"te-', "*-", "[a-z]-", "$1-", "ü-", "LAB-"]

numbers = count()


def student(name: str = "student") -> tuple[bytes, bytes]:
    """One who has not been here."""
    return STUDENT, f"{name}-{next(numbers)}".encode()


async def allocate(stack: Stack, *headers: tuple[bytes, bytes]) -> wire.Answer:
    return await wire.send(stack.url, wire.request("POST", "/v1/allocate", [TOKEN, *headers]))


def pieces(*more: bytes) -> st.SearchStrategy[bytes]:
    """Values of whatever bytes, some of them too long; CR and LF would end the header."""
    known = [b" ", b"\t", b"\x00", b"\x1b", b"\x7f", b"\xff", "ü日本".encode(), b"x" * 127, b"x" * 8192, *more]
    anything = st.binary(max_size=8).map(lambda value: value.replace(b"\r", b"").replace(b"\n", b""))
    return st.lists(st.one_of(st.sampled_from(known), anything, st.just(b"x"))).map(b"".join)


def refusal(value: bytes) -> str | None:
    """What the rules say of a header's value; None if it may be sent, be it blank."""
    if any((byte < 0x20 and byte != 0x09) or byte == 0x7F for byte in value):
        return "MALFORMED_REQUEST"  # that is no header any more
    value = value.strip(b" \t")
    return "INVALID_HEADER" if len(value) > 128 or re.search(rb"[^\x20-\x7e]", value) else None


@hypothesis_settings.with_seed
@given(name=st.sampled_from(OURS), value=pieces())
@example(STUDENT, b"x" * 8192)
@example(STUDENT, b"x" * 128)
@example(STUDENT, b"x" * 129)
@example(STUDENT, b" \t " + b"x" * 128 + b" \t ")
@example(STUDENT_OLD, b"\t")
@example(PREFIX, b"nul\x00")
@example(KEY, b"\xa0")
@hypothesis_settings.build_settings(60)
@pytest.mark.timeout(hypothesis_settings.TIMEOUT_SEC)
async def test_any_value_of_a_header_is_taken_or_refused_by_its_rule(
    stack: Stack, name: bytes, value: bytes
) -> None:
    headers = [(name, value)] if name in (STUDENT, STUDENT_OLD) else [student(), (name, value)]
    answer = await allocate(stack, *headers)
    blank = not value.strip(b" \t")
    if (code := refusal(value)) is not None:
        assert answer.error == (400, code)
    elif name in (STUDENT, STUDENT_OLD) and blank:
        assert answer.error == (400, "MISSING_SANDBOX_ID")
    else:
        # The pool is empty after a while, no name may start with this, and a key may be another student's.
        assert answer.error in (
            (200, None),
            (201, None),
            (409, "POOL_EXHAUSTED"),
            (409, "IDEMPOTENCY_KEY_CONFLICT"),
        )


@hypothesis_settings.with_seed
@given(prefix=pieces(*(name[:2].encode() for name in STRANGE_NAMES)))
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
    await provide_strange_names(stack)
    wanted = prefix.strip(b" \t").decode("latin-1")
    rows = await stack.database.fetch("SELECT name FROM sandboxes WHERE status = 'available'")
    fitting = {row["name"] for row in rows if row["name"].startswith(wanted)}
    answer = await allocate(stack, student(), (PREFIX, prefix))
    if (code := refusal(prefix)) is not None:
        assert answer.error == (400, code)
    elif fitting:
        assert answer.error == (201, None)
        assert answer.json["name"] in fitting
    else:
        assert answer.error == (409, "POOL_EXHAUSTED")
        assert wanted in answer.json["detail"]["message"]


async def provide_strange_names(stack: Stack) -> None:
    """A few sandboxes of each name, as often as they have been used up."""
    left = await stack.database.fetchval("SELECT count(DISTINCT available_stem) FROM sandboxes")
    if left < len(STRANGE_NAMES):
        for name_prefix in STRANGE_NAMES:
            await stack.control("POST", "accounts", {"count": 3, "name_prefix": name_prefix})
        assert (await stack.sync()).status_code == 200


async def test_a_header_that_comes_twice_is_refused_however_it_is_spelt(stack: Stack) -> None:
    for name, second in product(OURS, (b"same", b"other", b"")):
        for spelt in (name, name.lower(), name.upper()):
            headers = [(name, b"same"), (spelt, second)]
            if name not in (STUDENT, STUDENT_OLD):
                headers.append(student())
            answer = await allocate(stack, *headers)
            assert answer.error == (400, "INVALID_HEADER"), headers
            assert f"{name.decode()} was sent more than once" in answer.json["detail"]["message"]
    assert (await stack.stats())["allocated"] == 0


async def test_of_two_tokens_none_counts(stack: Stack) -> None:
    for second in (b"Bearer wrong", f"Bearer {ADMIN_TOKEN}".encode(), TOKEN[1], b""):
        for tokens in ([TOKEN, (b"authorization", second)], [(b"AUTHORIZATION", second), TOKEN]):
            answer = await wire.send(stack.url, wire.request("POST", "/v1/allocate", [*tokens, student()]))
            assert answer.error == (401, "UNAUTHORIZED"), tokens
    assert (await stack.stats())["allocated"] == 0


async def test_only_a_token_of_ours_is_taken_for_one(stack: Stack) -> None:
    ours = [TOKEN[1], TOKEN[1] + b" \t", b"bearer  \t" + TRACK_TOKEN.encode()]  # blanks around it are none of it
    others = [
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
    for value in [*ours, *others]:
        sent = wire.request("POST", "/v1/allocate", [(b"Authorization", value), student()])
        answer = await wire.send(stack.url, sent)
        assert answer.error == ((201, None) if value in ours else (401, "UNAUTHORIZED")), value
        assert answer.headers.get("WWW-Authenticate") == (None if value in ours else "Bearer")


async def test_control_characters_end_the_conversation_wherever_they_are(stack: Stack) -> None:
    names = (*OURS, b"Authorization", b"X-Request-ID", b"X-Foreign")
    values = (b"a\r\n b", b"a\rb", b"a\nb", b"a\nX-Evil: yes", b"a\r\n\tb", b"\x00", b"\x0b", b"\x7f")
    for name, value in product(names, values):
        answer = await allocate(stack, student(), (name, value))
        assert answer.error == (400, "MALFORMED_REQUEST"), (name, value)
        assert "X-Evil" not in answer.headers
    assert (await stack.stats())["allocated"] == 0


async def test_a_request_id_that_is_not_well_formed_is_not_given_back(stack: Stack) -> None:
    for value in (b"x" * 129, b"x" * 8192, b"two words", b"\xff", "ü".encode(), b"<b>", b"%0d%0aX-Evil:1"):
        answer = await allocate(stack, student(), (b"X-Request-ID", value))
        assert answer.status == 201
        assert UUID.fullmatch(answer.headers["X-Request-ID"]), value


async def test_what_a_header_may_hold_is_kept_to_the_letter(stack: Stack) -> None:
    every_character = bytes(range(0x21, 0x7F)) + b" " + bytes(range(0x21, 0x42))
    assert len(every_character) == 128
    backwards = every_character[::-1]
    lease = await allocate(stack, (STUDENT, every_character), (LAB, backwards), (KEY, every_character))
    assert lease.status == 201
    path = f"/v1/sandboxes/{lease.json['sandbox_id']}"
    seen = await wire.send(stack.url, wire.request("GET", path, [TOKEN, (STUDENT, every_character)]))
    assert seen.json["allocated_to_track"].encode() == every_character
    assert seen.json["track_name"].encode() == backwards
    again = await allocate(stack, (STUDENT, every_character), (KEY, every_character))
    assert (again.status, again.json) == (200, lease.json)
    other = await allocate(stack, student(), (KEY, every_character))
    assert other.error == (409, "IDEMPOTENCY_KEY_CONFLICT")
    stranger = await wire.send(stack.url, wire.request("GET", path, [TOKEN, (STUDENT, every_character.swapcase())]))
    assert stranger.error == (403, "NOT_SANDBOX_OWNER")


async def test_many_long_headers_of_others_do_no_harm(stack: Stack) -> None:
    others = [(b"X-Other-%d" % number, b"x" * 8192) for number in range(50)]
    assert (await allocate(stack, student(), *others)).status == 201


async def test_a_sandbox_id_of_whatever_bytes_is_not_found(stack: Stack) -> None:
    strange = ("%00", "%ff%fe", "%ed%a0%80", "%25", "_", "%27%20OR%201=1", "x" * 8192, "%0d%0aX-Evil:1", "%C3%BC")
    for sandbox_id, (method, end) in product(strange, (("GET", ""), ("POST", "/mark-for-deletion"))):
        sent = wire.request(method, f"/v1/sandboxes/{sandbox_id}{end}", [TOKEN, student()])
        answer = await wire.send(stack.url, sent)
        assert answer.error == (404, "SANDBOX_NOT_FOUND"), (method, sandbox_id)
        assert "X-Evil" not in answer.headers
