"""Waiting for conditions. The tests of clear_tables() use wait_until_blocked()."""

import asyncio

import pytest

from devstack.conditions import wait_until


async def test_a_function_is_called_until_its_result_is_true() -> None:
    results = iter([False, 0, None, "", "true"])
    await wait_until(lambda: next(results), every_sec=0)
    assert list(results) == []


async def test_a_coroutine_function_is_awaited() -> None:
    results = iter([False, True])

    async def condition() -> bool:
        return next(results)

    await wait_until(condition, every_sec=0)
    assert list(results) == []


async def test_the_error_names_the_condition() -> None:
    def is_never_true() -> bool:
        return False

    with pytest.raises(AssertionError, match=r"not true within 0\.01 s: .*is_never_true"):
        await wait_until(is_never_true, within_sec=0.01, every_sec=0)


async def test_a_condition_that_does_not_return_is_cancelled() -> None:
    async def hang() -> bool:
        return await asyncio.Event().wait()

    with pytest.raises(AssertionError, match="hang"):
        await wait_until(hang, within_sec=0.01)


async def test_an_error_of_the_condition_ends_the_waiting() -> None:
    async def fail() -> bool:
        raise TimeoutError("of the condition")

    with pytest.raises(TimeoutError, match="of the condition"):
        await wait_until(fail)
