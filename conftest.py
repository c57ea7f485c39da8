"""Fixtures for all tests, and the order of the test files."""

import gc
from collections.abc import Iterator

import pytest

pytest_plugins = ["devstack.lanes", "devstack.testing"]


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[None]:
    """Collect without garbage collection, which would take a third of the processor time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()  # modules and tests stay until the end
        gc.enable()


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start files with long time-outs first, then those with a whole broker, then the others in random order.

    All processors then stay busy until the end of the run.
    """
    timeouts: dict[object, float] = {}
    for item in items:
        timeouts[item.path] = max(timeouts.get(item.path, 0), _timeout_sec(item))
    integration_tests = config.rootpath / "tests"
    items.sort(key=lambda item: (-timeouts[item.path], not item.path.is_relative_to(integration_tests)))


def _timeout_sec(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker is not None else 0
