"""Tests with a Docker engine: `make test-containers`. They are not part of `make test` and are never skipped."""

from collections.abc import AsyncIterator

import pytest

from devstack import docker
from tests.containers.compose import Compose, build_images, run_compose


@pytest.fixture(scope="session", autouse=True)
async def engine(server_programs: None) -> None:
    """Require a Docker engine. `server_programs` puts the tests into the server lane."""
    reason = await docker.unavailable_reason()
    if reason is not None:
        pytest.exit(f"these tests need a Docker engine: {reason}", returncode=2)


@pytest.fixture(scope="session")
async def images() -> dict[str, str]:
    """Build the images from this clone. Return their names by service."""
    return await build_images()


@pytest.fixture(scope="session")
async def compose(images: dict[str, str]) -> AsyncIterator[Compose]:
    """Start docker-compose.yml as a separate project and wait until it is healthy. Removes it with its data."""
    async with run_compose(images) as compose:
        yield compose
