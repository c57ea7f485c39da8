"""A Chromium, for the tests that look at a page as people do."""

from devstack import packages
from devstack.output import Terminal

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


async def find_chromium(terminal: Terminal) -> str:
    """The path of the program: the one on this machine, else that of Debian's package. Raises CannotRun."""
    return await packages.find_or_install(_PROGRAMS, "chromium", terminal)
