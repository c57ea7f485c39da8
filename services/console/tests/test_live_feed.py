"""Live feed: pages with the same token share one stream and its answers, until the broker changes."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest

from console import live_feed
from console.live_feed import LiveFeed, LiveFeeds


class Upstream(httpx2.AsyncByteStream):
    """Stream of the gateway with events on demand."""

    def __init__(self) -> None:
        self.lines: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while (line := await self.lines.get()) is not None:
            yield line

    def response(self) -> httpx2.Response:
        return httpx2.Response(200, stream=self)


async def answer(values: list[int]) -> int:
    values.append(len(values))
    return values[-1]


async def test_pages_share_answers_until_a_change() -> None:
    upstream = Upstream()
    feed = LiveFeed(upstream.response())
    page, fetched = asyncio.Event(), list[int]()
    feed.pages.add(page)
    assert await asyncio.gather(*(feed.share("stats", lambda: answer(fetched)) for _ in range(3))) == [0, 0, 0]
    assert await feed.share("other", lambda: answer(fetched)) == 1
    upstream.lines.put_nowait(b"event: sandbox.allocated\ndata: {}\n\n")
    await asyncio.wait_for(page.wait(), 5)
    assert await feed.share("stats", lambda: answer(fetched)) == 2
    feed.forget_answers()
    assert await feed.share("stats", lambda: answer(fetched)) == 3
    await feed.close()


async def test_many_events_are_few_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_feed, "PAUSES_SEC", (0.2,))
    upstream = Upstream()
    feed = LiveFeed(upstream.response())
    page, changes = asyncio.Event(), 0
    feed.pages.add(page)
    for _ in range(3):
        for _ in range(100):
            upstream.lines.put_nowait(b"data: {}\n")
        await asyncio.wait_for(page.wait(), 5)
        page.clear()
        changes += 1
    assert changes == 3
    upstream.lines.put_nowait(None)
    await asyncio.wait_for(feed._reading, 5)
    assert feed.is_ended
    await feed.close()


async def test_pauses_grow_while_events_continue_and_shrink_after_a_quiet_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(live_feed, "PAUSES_SEC", (0.05, 2.0))
    upstream, loop = Upstream(), asyncio.get_running_loop()
    feed = LiveFeed(upstream.response())
    page = asyncio.Event()
    feed.pages.add(page)

    async def push_and_measure() -> float:
        """Return the pause since the last change, in seconds."""
        before = feed._changed_at
        upstream.lines.put_nowait(b"data: {}\n")
        await asyncio.wait_for(page.wait(), 10)
        page.clear()
        return feed._changed_at - before

    assert await push_and_measure() == float("inf")
    assert await push_and_measure() >= 0.05
    assert await push_and_measure() >= 2.0
    assert await push_and_measure() >= 2.0
    await asyncio.sleep(feed._changed_at + 2.05 - loop.time())  # a quiet time, which only elapsed time makes
    assert await push_and_measure() >= 2.0
    assert 0.05 <= await push_and_measure() < 2.0
    await feed.close()


async def test_an_error_is_not_shared() -> None:
    feed = LiveFeed(Upstream().response())

    async def fail() -> int:
        raise ValueError

    with pytest.raises(ValueError):  # noqa: PT011 (the test raises it)
        await feed.share("stats", fail)
    assert await feed.share("stats", lambda: answer([])) == 0
    await feed.close()


async def test_a_token_has_one_stream_while_a_page_is_open() -> None:
    feeds, opened = LiveFeeds(2), list[Upstream]()

    async def connect() -> httpx2.Response:
        opened.append(Upstream())
        return opened[-1].response()

    first, second = asyncio.Event(), asyncio.Event()
    feed = await feeds.join("token", first, connect)
    assert await feeds.join("token", second, connect) is feed
    assert feeds.is_full
    assert len(opened) == 1
    assert feeds.find("token") is feed
    assert feeds.find("other") is None
    await feeds.leave("token", feed, first)
    await feeds.leave("token", feed, second)
    assert feeds.find("token") is None
    assert feeds.count == 0
