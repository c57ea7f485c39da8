"""Log context: its ids apply to a block and to the tasks started in it."""

import asyncio

from sandbox_broker.observability import log_context


async def test_ids_apply_to_the_block_and_its_tasks() -> None:
    async def task() -> dict[str, object]:
        log_context.bind(sandbox_id="7")
        return dict(log_context.ids())

    with log_context.bound(request_id="r", holder=None):
        assert await asyncio.create_task(task()) == {"request_id": "r", "sandbox_id": "7"}
        assert dict(log_context.ids()) == {"request_id": "r"}
        assert log_context.request_id() == "r"
        with log_context.bound(request_id="s"):
            assert log_context.request_id() == "s"
    assert dict(log_context.ids()) == {}
    assert log_context.request_id() is None


def test_ids_are_split_into_lines_below_the_limit_of_log_drivers() -> None:
    ids = [f"{number:0128}" for number in range(120)]
    lines = list(log_context.split_by_line(ids))
    assert [id_ for line in lines for id_ in line] == ids
    assert max(len(str(line)) for line in lines) < 8 * 1024
    assert list(log_context.split_by_line([])) == [[]]
