"""Fixtures for every test, and the order in which files are begun."""

import pytest

pytest_plugins = ["devstack.testing"]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Files that may take long are begun first, then those that start a whole broker, so that no processor waits
    for the last of them; else by chance."""
    longest: dict[object, float] = {}
    for item in items:
        longest[item.path] = max(longest.get(item.path, 0), _may_take_sec(item))
    whole = config.rootpath / "tests"
    items.sort(key=lambda item: (-longest[item.path], not item.path.is_relative_to(whole)))


def _may_take_sec(item: pytest.Item) -> float:
    marker = item.get_closest_marker("timeout")
    return float(marker.args[0]) if marker is not None else 0
