"""Chromium, for tests of a page in a real browser."""

from devstack import packages
from devstack.output import Terminal

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


async def find_chromium(terminal: Terminal) -> str:
    """Return the path of Chromium. Installs Debian's package if it is missing. Raises CannotRun."""
    return await packages.find_or_install(_PROGRAMS, "chromium", terminal)
