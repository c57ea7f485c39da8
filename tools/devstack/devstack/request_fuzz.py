"""Random pairs of requests, for tests against request smuggling: an attacker's request whose framing is odd, and
a victim's request that follows on the same connection."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random

MARKER = b"X-Marker"
VICTIM = b"/victim"
SMUGGLED = b"/smuggled"
"""Prefix of the targets in bodies. A server executes them only if they stand outside of a body by chance."""

_SMUGGLED = [
    b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST /smuggled?reason=x HTTP/1.1\r\nHost: x\r\nX-Ignore: ",
    b"POST /smuggled?reason=x HTTP/1.1\r\nX-Ignore: ",
    b"POST /smuggled HTTP/1.1\r\nHost: x\r\nContent-Length: 500\r\n\r\n",
    b"0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
    b"\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n",
]


@dataclass
class Draft:
    """A request in parts, for mutations."""

    method: bytes
    target: bytes
    version: bytes = b"HTTP/1.1"
    fields: list[bytes] = field(default_factory=list)
    """Field lines without their line ends."""
    body: bytes = b""
    line_end: bytes = b"\r\n"
    before: bytes = b""
    """Bytes before the request line."""

    @property
    def head(self) -> bytes:
        request_line = b" ".join(part for part in (self.method, self.target, self.version) if part)
        return self.before + self.line_end.join([request_line, *self.fields, b"", b""])


@dataclass(frozen=True, slots=True)
class Pair:
    segments: tuple[bytes, ...]
    """Of the first request. Each goes out as a TCP segment of its own."""
    victim: tuple[bytes, ...]
    """Segments of the second request."""
    pipelined: bool
    """Send the victim's request without waiting for the responses to the first."""


def generate_pair(random: Random, number: int) -> Pair:
    draft = generate_request(random, b"first-%d" % number)
    for _ in range(random.choice([0, 1, 1, 1, 2, 2, 3])):
        random.choice(_MUTATIONS)(random, draft)
    first = draft.head + draft.body
    if random.random() < 0.08:
        first = _corrupt(random, first)
    cuts = [len(draft.head)] if random.random() < 0.5 else []
    victim = generate_victim(random, b"victim-%d" % number)
    return Pair(_cut(random, first, cuts), _cut(random, victim, []), random.random() < 0.5)


def generate_victim(random: Random, marker: bytes) -> bytes:
    draft = Draft(b"POST", VICTIM, fields=[b"Host: x", MARKER + b": " + marker, b"Authorization: Bearer secret"])
    if random.random() < 0.5:
        draft.method = b"GET"
    else:
        _add_body(random, draft, chunked=False)
    return draft.head + draft.body


def generate_request(random: Random, marker: bytes) -> Draft:
    method = random.choice([b"POST", b"POST", b"POST", b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"PATCH"])
    target = random.choice([b"/read", b"/early"]) + random.choice([b"", b"?a=b", b"/%41", b"//x", b"?a=/../b"])
    draft = Draft(method, target, fields=[b"Host: x", MARKER + b": " + marker])
    if method in (b"POST", b"PUT", b"PATCH") or random.random() < 0.3:
        _add_body(random, draft, chunked=random.random() < 0.5)
    random.shuffle(draft.fields)
    return draft


def _add_body(random: Random, draft: Draft, *, chunked: bool) -> None:
    content = random.choice([b"", b"x", random.randbytes(random.randrange(40)), *_SMUGGLED])
    if not chunked:
        draft.fields.append(b"Content-Length: %d" % len(content))
        draft.body = content
        return
    draft.fields.append(random.choice([b"Transfer-Encoding: chunked", b"transfer-encoding:Chunked"]))
    while content:
        size = random.randint(1, len(content))
        draft.body += b"%x\r\n" % size + content[:size] + b"\r\n"
        content = content[size:]
    draft.body += b"0\r\n\r\n"


def _cut(random: Random, data: bytes, cuts: list[int]) -> tuple[bytes, ...]:
    cuts = sorted({*cuts, *(random.randrange(len(data)) for _ in range(random.randrange(3)))} - {0})
    return tuple(data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True) if start < end)


def _corrupt(random: Random, data: bytes) -> bytes:
    """Change, insert or remove one byte."""
    index = random.randrange(len(data))
    replaced = random.choice(
        [b"", bytes([random.randrange(256)]), random.choice([b"\r", b"\n", b"\0", b" ", b":"])]
    )
    return data[:index] + replaced + data[index + random.randrange(2) :]


def _insert(random: Random, draft: Draft, *lines: bytes) -> None:
    for line in lines:
        draft.fields.insert(random.randint(0, len(draft.fields)), line)


def _remove(draft: Draft, name: bytes) -> None:
    draft.fields = [line for line in draft.fields if not line.lower().startswith(name)]


def _offer_upgrade(random: Random, draft: Draft) -> None:
    protocol = random.choice([b"x", b"websocket", b"h2c", b"h2c, x", b"TLS/1.0"])
    name = random.choice([b"Upgrade", b"upgrade", b"UPGRADE"])
    connection = random.choice([b"Upgrade", b"upgrade", b"keep-alive, Upgrade", b"Upgrade, close", b"Upgrade,x"])
    _insert(random, draft, b"Connection: " + connection, name + b": " + protocol)


def _offer_h2c(random: Random, draft: Draft) -> None:
    """The offer of Java's HttpClient."""
    offer = [b"Connection: Upgrade, HTTP2-Settings", b"HTTP2-Settings: AAEAAEAAAAIAAAAAAAMAAAAA", b"Upgrade: h2c"]
    _insert(random, draft, *offer)


def _offer_split_upgrade(random: Random, draft: Draft) -> None:
    _insert(random, draft, b"Connection: keep-alive", b"Connection: \tupgrade ", b"Upgrade: x", b"Upgrade: y")


def _change_content_length(random: Random, draft: Draft) -> None:
    _remove(draft, b"content-length")
    size = len(draft.body)
    value = random.choice(
        [
            b"%d" % max(size - 1, 0),
            b"%d" % (size + 1),
            b"%d" % (size + 40),
            b"+%d" % size,
            b"-%d" % size,
            b"0x%x" % size,
            b"00%d" % size,
            b"%d " % size,
            b"%d\t" % size,
            b"%d, %d" % (size, size),
            b"%d,%d" % (size, size + 1),
            b"%d;a=b" % size,
            b"%d.0" % size,
            b"1_0",
            b"\xb2",
            b"",
            b"many",
            b"%d" % (2**64 + size),
            b"%d" % (2**63),
        ]
    )
    _insert(random, draft, random.choice([b"Content-Length: ", b"content-length:", b"Content-Length:\t"]) + value)


def _add_content_length(random: Random, draft: Draft) -> None:
    for _ in range(random.choice([1, 1, 2])):
        _insert(random, draft, b"Content-Length: %d" % random.choice([0, 1, len(draft.body), len(draft.body) + 5]))


def _change_transfer_encoding(random: Random, draft: Draft) -> None:
    if random.random() < 0.7:
        _remove(draft, b"transfer-encoding")
    _insert(
        random,
        draft,
        random.choice(
            [
                b"Transfer-Encoding: chunked",
                b"Transfer-Encoding: CHUNKED",
                b"Transfer-Encoding: chunked ",
                b"Transfer-Encoding:\tchunked",
                b"Transfer-Encoding: chunked\t",
                b"Transfer-Encoding: chunked, chunked",
                b"Transfer-Encoding: gzip, chunked",
                b"Transfer-Encoding: chunked, gzip",
                b"Transfer-Encoding: identity",
                b"Transfer-Encoding: identity, chunked",
                b"Transfer-Encoding: xchunked",
                b"Transfer-Encoding: chunkedx",
                b"Transfer-Encoding: ,chunked",
                b"Transfer-Encoding: chunked,",
                b"Transfer-Encoding: chunked;q=1",
                b'Transfer-Encoding: "chunked"',
                b"Transfer-Encoding: chun\x0bked",
                b"Transfer-Encoding: \x0bchunked",
                b"Transfer-Encoding:",
                b"Transfer-Encoding : chunked",
                b"Transfer_Encoding: chunked",
                b"Transfer-Encoding\t: chunked",
                b" Transfer-Encoding: chunked",
                b"X: y\rTransfer-Encoding: chunked",
                b"X: y\nTransfer-Encoding: chunked",
            ]
        ),
    )


def _add_bad_field(random: Random, draft: Draft) -> None:
    _insert(
        random,
        draft,
        random.choice(
            [
                b"X-Folded: a\r\n b",
                b"X-Folded: a\r\n\tContent-Length: 5",
                b"X-Null: a\0b",
                b"X-Bare: a\rb",
                b"X-Bare: a\nb",
                b"X-Bare: a\r\r",
                b"X-Space : a",
                b" X-Space: a",
                b"No colon",
                b": no name",
                b"X-Bell: a\x07b",
                b"X-Delete: \x7f",
                b"X-\xff: a",
                b"X-High: \xff\xfe",
                b"X-Empty:",
                b"X-Empty: \t ",
                b"X(Comment): a",
                b"X-Unicode\xc2\xa0: a",
            ]
        ),
    )


def _change_host(random: Random, draft: Draft) -> None:
    if random.random() < 0.5:
        _remove(draft, b"host:")
    if random.random() < 0.7:
        _insert(random, draft, random.choice([b"Host: y", b"host:x", b"Host:", b"Host : x", b"HOST: x:80"]))


def _change_connection(random: Random, draft: Draft) -> None:
    _insert(
        random,
        draft,
        b"Connection: "
        + random.choice(
            [
                b"close",
                b"Close",
                b"close ",
                b"close\t",
                b"x, close",
                b"close, keep-alive",
                b"keep-alive, close",
                b",close",
                b"close,",
                b"x\tclose",
                b"keep-alive",
                b"closed",
                b"content-length",
                b"transfer-encoding",
                b"host",
            ]
        ),
    )


def _change_version(random: Random, draft: Draft) -> None:
    draft.version = random.choice(
        [
            *[b"HTTP/1.0"] * 4,
            b"HTTP/0.9",
            b"HTTP/1.2",
            b"HTTP/2.0",
            b"HTTP/3.0",
            b"HTTP/1.10",
            b"http/1.1",
            b"RTSP/1.0",
            b"ICE/1.0",
            b"HTTP/1.1 ",
            b" HTTP/1.1",
            b"",
        ]
    )
    if random.random() < 0.3:
        _insert(random, draft, b"Connection: keep-alive")


def _change_target(random: Random, draft: Draft) -> None:
    draft.target = random.choice(
        [
            b"http://x" + draft.target,
            b"http://other:80" + draft.target,
            b"http://x",
            b"//x" + draft.target,
            b"*",
            b"x:443",
            b"read",
            b" " + draft.target,
            b"\t" + draft.target,
            draft.target + b"#fragment",
            draft.target + b"\xff",
            draft.target + b"\\",
            draft.target + b" x",
            draft.target + b"?",
        ]
    )


def _change_method(random: Random, draft: Draft) -> None:
    draft.method = random.choice(
        [
            b"CONNECT",
            b"CONNECT",
            b"PRI",
            b"SOURCE",
            b"post",
            b"POST ",
            b"TRACE",
            b"LINK",
            b"BREW",
            b"P\0ST",
            b"M-SEARCH",
        ]
    )


def _expect(random: Random, draft: Draft) -> None:
    _insert(random, draft, random.choice([b"Expect: 100-continue", b"Expect: 100-Continue", b"Expect: x"]))


def _change_chunks(random: Random, draft: Draft) -> None:
    _remove(draft, b"content-length")
    _remove(draft, b"transfer-encoding")
    draft.fields.append(b"Transfer-Encoding: chunked")
    draft.body = random.choice(
        [
            b"5;a=b\r\nhello\r\n0\r\n\r\n",
            b'5;a="b;c"\r\nhello\r\n0;last\r\n\r\n',
            b"5;\r\nhello\r\n0\r\n\r\n",
            b"5 ;a\r\nhello\r\n0\r\n\r\n",
            b"5;a\nb\r\nhello\r\n0\r\n\r\n",
            b"5;a\rb\r\nhello\r\n0\r\n\r\n",
            b"5;" + b"a" * 9000 + b"\r\nhello\r\n0\r\n\r\n",
            b"5 \r\nhello\r\n0\r\n\r\n",
            b"5\nhello\n0\n\n",
            b"5\r\nhello\n0\r\n\r\n",
            b"5\r\nhello0\r\n\r\n",
            b"5\r\nhelloXX0\r\n\r\n",
            b"6\r\nhello\r\n0\r\n\r\n",
            b"4\r\nhello\r\n0\r\n\r\n",
            b"05\r\nhello\r\n00\r\n\r\n",
            b"0x5\r\nhello\r\n0\r\n\r\n",
            b"+5\r\nhello\r\n0\r\n\r\n",
            b"-1\r\nhello\r\n0\r\n\r\n",
            b"5_\r\nhello\r\n0\r\n\r\n",
            b"\r\nhello\r\n0\r\n\r\n",
            b"g\r\nhello\r\n0\r\n\r\n",
            b"10000000000000005\r\nhello\r\n0\r\n\r\n",
            b"ffffffffffffffff\r\nhello\r\n0\r\n\r\n",
            b"5\r\nhello\r\n0\r\nX-Marker: trailer\r\n\r\n",
            b"5\r\nhello\r\n0\r\nX-Trailer: " + b"a" * 5000 + b"\r\n\r\n",
            b"5\r\nhello\r\n0\r\nConnection: close\r\n\r\n",
            b"5\r\nhello\r\n0\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
            b"5\r\nhello\r\n0\r\nContent-Length: 5\r\n\r\n",
            b"5\r\nhello\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"5\r\nhello\r\n0\r\nHost: y\r\nAuthorization: x\r\n\r\n",
            b"5\r\nhello\r\n0\r\nno colon\r\n\r\n",
            b"5\r\nhello\r\n0\r\nX: y\r\n z\r\n\r\n",
            b"5\r\nhello\r\n0\r\n",
            b"5\r\nhello\r\n",
            b"0\r\n\r\n0\r\n\r\n",
        ]
    )


def _add_many_fields(random: Random, draft: Draft) -> None:
    count = random.choice([60, 90, 110, 200])
    draft.fields += [b"X-%d: x" % number for number in range(count)]


def _add_long_field(random: Random, draft: Draft) -> None:
    draft.fields.append(b"X-Long: " + b"x" * random.choice([5000, 12000, 17000, 40000]))


def _use_bare_line_feeds(random: Random, draft: Draft) -> None:
    draft.line_end = random.choice([b"\n", b"\n", b"\r", b"\r\r\n", b"\n\r"])


def _add_bytes_before(random: Random, draft: Draft) -> None:
    draft.before = random.choice([b"\r\n", b"\r\n\r\n", b"\n", b" ", b"\0", b"x", b"\r"])


def _add_bytes_after(random: Random, draft: Draft) -> None:
    draft.body += random.choice([b"\r\n", b"x", b"\0", *_SMUGGLED])


def _pipeline(random: Random, draft: Draft) -> None:
    following = generate_request(random, b"pipelined")
    draft.body += following.head + following.body


_MUTATIONS: Sequence[Callable[[Random, Draft], None]] = [
    *[_offer_upgrade, _offer_upgrade, _offer_h2c, _offer_split_upgrade],
    *[_change_content_length, _add_content_length, _change_transfer_encoding, _change_chunks, _change_chunks],
    *[_add_bad_field, _change_host, _change_connection, _change_version, _change_target, _change_method],
    *[_expect, _add_many_fields, _add_long_field, _use_bare_line_feeds],
    *[_add_bytes_before, _add_bytes_after, _pipeline],
]
