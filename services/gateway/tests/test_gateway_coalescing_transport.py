"""Coalescing of the head and body of a response into one write."""

import asyncio
from typing import Any

import pytest

from devstack.conditions import wait_until
from gateway.web.uvicorn_protocol import CoalescingTransport


class Recorder:
    """Transport that records its calls."""

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def write(self, data: bytes) -> None:
        self.calls.append(data)

    def close(self) -> None:
        self.calls.append("close")

    def get_write_buffer_size(self) -> int:
        return 7


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def transport(recorder: Recorder) -> Any:
    return CoalescingTransport(recorder, asyncio.get_running_loop())  # type: ignore[arg-type]


async def test_two_consecutive_writes_are_sent_as_one(transport: Any, recorder: Recorder) -> None:
    for data in (b"head", b"body", b"head 2", b"body 2"):
        transport.write(data)
    assert recorder.calls == [b"headbody", b"head 2body 2"]


async def test_a_single_write_is_sent_in_the_next_turn_of_the_event_loop(
    transport: Any, recorder: Recorder
) -> None:
    transport.write(b"head")
    transport.write(b"first")
    transport.write(b"second")
    await wait_until(lambda: recorder.calls == [b"headfirst", b"second"])


async def test_close_sends_the_pending_write(transport: Any, recorder: Recorder) -> None:
    transport.write(b"head")
    transport.close()
    assert recorder.calls == [b"head", "close"]
    transport.write(b"head")
    await wait_until(lambda: recorder.calls == [b"head", "close", b"head"])


async def test_other_attributes_are_those_of_the_inner_transport(transport: Any) -> None:
    assert transport.get_write_buffer_size() == 7
