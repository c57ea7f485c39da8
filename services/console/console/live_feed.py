"""Live feeds: one stream of the gateway for all open pages with the same token, and the answers that they share.

Without sharing, each open page would ask the gateway for the same numbers after each event, and the rate limit of
the token would refuse them.
"""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import httpx2

SHARED_SEC = 2.0
"""Longest time that an answer is shared."""
PAUSES_SEC = (2.0, 3.0, 4.0, 5.0)
"""Pauses between the changes for the pages while events continue. The last one is then repeated. Each change costs
the gateway several requests, so one change stands for many events."""


class LiveFeed:
    """Open pages with one token."""

    def __init__(self, upstream: httpx2.Response) -> None:
        self.pages: set[asyncio.Event] = set()
        """Each is set when the broker has changed."""
        self._upstream = upstream
        self._answers: dict[object, tuple[float, asyncio.Task[Any]]] = {}
        self._changed_at = float("-inf")
        self._pauses = 0
        """Number of changes since the last quiet time, which is as long as the last of PAUSES_SEC."""
        self._timer: asyncio.TimerHandle | None = None
        self._reading = asyncio.create_task(self._read_upstream())

    @property
    def is_ended(self) -> bool:
        """Return whether the gateway has ended its stream. The browsers then connect again."""
        return self._reading.done()

    async def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._reading.cancel()
        await asyncio.wait([self._reading])
        await self._upstream.aclose()

    async def share(self, key: object, fetch: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """Return the answer that another page has just got, or fetch it. An answer is older than no change that the
        pages know of, and at most SHARED_SEC old."""
        now = asyncio.get_running_loop().time()
        began_at, task = self._answers.get(key, (float("-inf"), None))
        if task is None or now - began_at > SHARED_SEC:
            task = asyncio.create_task(fetch())
            task.add_done_callback(lambda done: self._forget_failure(key, done))
            self._answers[key] = (now, task)
        return await asyncio.shield(task)

    def forget_answers(self) -> None:
        self._answers.clear()

    def _forget_failure(self, key: object, task: asyncio.Task[Any]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._answers.pop(key, None)

    async def _read_upstream(self) -> None:
        try:
            async for line in self._upstream.aiter_lines():
                if line.startswith("data:"):
                    self._schedule_change()
        except httpx2.HTTPError:
            return

    def _schedule_change(self) -> None:
        if self._timer is not None:
            return
        loop = asyncio.get_running_loop()
        if loop.time() - self._changed_at >= PAUSES_SEC[-1]:
            self._pauses = 0
            at = loop.time()
        else:
            at = max(loop.time(), self._changed_at + PAUSES_SEC[min(self._pauses, len(PAUSES_SEC) - 1)])
            self._pauses += 1
        self._timer = loop.call_at(at, self._change)

    def _change(self) -> None:
        self._timer = None
        self._changed_at = asyncio.get_running_loop().time()
        self.forget_answers()
        for page in self.pages:
            page.set()


class LiveFeeds:
    """Live feeds by token, with a limit for the pages of all of them."""

    def __init__(self, max_pages: int) -> None:
        self._max_pages = max_pages
        self._feeds: dict[str, LiveFeed] = {}
        self._opening = asyncio.Lock()
        self.count = 0

    @property
    def is_full(self) -> bool:
        return self.count >= self._max_pages

    def find(self, token: str) -> LiveFeed | None:
        feed = self._feeds.get(token)
        return None if feed is None or feed.is_ended else feed

    async def join(
        self, token: str, page: asyncio.Event, connect: Callable[[], Coroutine[Any, Any, httpx2.Response]]
    ) -> LiveFeed:
        """Add a page to the feed of the token, which `connect` opens for the first page."""
        async with self._opening:
            feed = self.find(token)
            if feed is None:
                feed = self._feeds[token] = LiveFeed(await connect())
        feed.pages.add(page)
        self.count += 1
        return feed

    async def leave(self, token: str, feed: LiveFeed, page: asyncio.Event) -> None:
        feed.pages.discard(page)
        self.count -= 1
        if not feed.pages:
            if self._feeds.get(token) is feed:
                del self._feeds[token]
            await feed.close()
