"""What needs a Docker engine: `make test-containers`. Not a part of `make test`, and nothing in it is left out."""

from collections.abc import AsyncIterator

import pytest

from devstack import docker
from tests.containers.compose import Compose, build_images, running


@pytest.fixture(scope="session", autouse=True)
async def engine() -> None:
    reason = await docker.unavailable_reason()
    if reason is not None:
        pytest.exit(f"these tests need a Docker engine: {reason}", returncode=2)


@pytest.fixture(scope="session")
async def images() -> dict[str, str]:
    """By service, all of them built from this clone."""
    return await build_images()


@pytest.fixture(scope="session")
async def compose(images: dict[str, str]) -> AsyncIterator[Compose]:
    """The whole of docker-compose.yml, ready; a project of its own, which goes in the end with its data."""
    async with running(images) as compose:
        yield compose
