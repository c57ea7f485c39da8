"""Head and body of a response leave together, and nothing waits for what does not come."""

import asyncio
from typing import Any

import pytest

from gateway.web.uvicorn_protocol import CoalescingTransport

from .gateway_harness import until


class Recorder:
    """A transport that remembers what was done with it."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    def write(self, data: bytes) -> None:
        self.done.append(data)

    def close(self) -> None:
        self.done.append("close")

    def get_write_buffer_size(self) -> int:
        return 7


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def transport(recorder: Recorder) -> Any:
    return CoalescingTransport(recorder, asyncio.get_running_loop())  # type: ignore[arg-type]


async def test_two_pieces_that_are_written_at_once_are_sent_as_one(transport: Any, recorder: Recorder) -> None:
    for piece in (b"head", b"body", b"head 2", b"body 2"):
        transport.write(piece)
    assert recorder.done == [b"headbody", b"head 2body 2"]


async def test_a_piece_alone_is_sent_without_another(transport: Any, recorder: Recorder) -> None:
    transport.write(b"head")
    transport.write(b"first")
    transport.write(b"second")
    await until(lambda: recorder.done == [b"headfirst", b"second"])


async def test_closing_sends_what_waits(transport: Any, recorder: Recorder) -> None:
    transport.write(b"head")
    transport.close()
    assert recorder.done == [b"head", "close"]
    transport.write(b"head")
    await until(lambda: recorder.done == [b"head", "close", b"head"])


async def test_all_else_is_the_transports_own(transport: Any) -> None:
    assert transport.get_write_buffer_size() == 7
