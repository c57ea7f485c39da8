"""A Chromium, for the tests that look at a page as people do."""

import shutil

from devstack import packages
from devstack.errors import CannotRun
from devstack.output import Terminal

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


async def find(terminal: Terminal) -> str:
    """The path of the program: the one on this machine, else that of Debian's package. Raises CannotRun."""
    found = _program()
    if found is None and packages.can_install():
        await packages.install("chromium", terminal)
        found = _program()
    if found is None:
        raise CannotRun(f"no {', '.join(_PROGRAMS)} found: install one of them")
    return found


def _program() -> str | None:
    return next((path for name in _PROGRAMS if (path := shutil.which(name)) is not None), None)
