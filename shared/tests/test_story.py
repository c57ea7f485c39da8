"""The ids of the work at hand follow it into tasks and no further."""

import asyncio

from sandbox_broker import story


async def test_ids_hold_within_the_block_and_in_its_tasks() -> None:
    async def task() -> dict[str, object]:
        story.bind(sandbox_id="7")
        return dict(story.ids())

    with story.bound(request_id="r", holder=None):
        assert await asyncio.create_task(task()) == {"request_id": "r", "sandbox_id": "7"}
        assert dict(story.ids()) == {"request_id": "r"}
        assert story.request_id() == "r"
        with story.bound(request_id="s"):
            assert story.request_id() == "s"
    assert dict(story.ids()) == {}
    assert story.request_id() is None


def test_ids_are_cut_into_lines_that_no_log_driver_cuts() -> None:
    ids = [f"{number:0128}" for number in range(120)]
    lines = list(story.by_line(ids))
    assert [id_ for line in lines for id_ in line] == ids
    assert max(len(str(line)) for line in lines) < 8 * 1024
    assert list(story.by_line([])) == [[]]
