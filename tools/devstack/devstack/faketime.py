"""libfaketime, for tests that set the clock of a process wrong while it runs."""

from collections.abc import Mapping
from pathlib import Path

from devstack import packages
from devstack.errors import CannotRun
from devstack.output import Terminal

_LIBRARY = "faketime/libfaketimeMT.so.1"
_SHARED_MEMORY = Path("/dev/shm")
_DIRECTORIES = (Path("/usr/lib"), Path("/usr/local/lib"))


async def find_library(terminal: Terminal) -> Path:
    """The one on this machine, else that of Debian's package. Raises CannotRun."""
    found = _find()
    if found is None and packages.can_install():
        await packages.install("libfaketime", terminal)
        found = _find()
    if found is None:
        raise CannotRun("libfaketime not found: install it (Debian, Ubuntu: apt-get install libfaketime)")
    return found


def build_environment(library: Path, offset_file: Path) -> Mapping[str, str]:
    """For a process whose clock goes as the file tells; it looks once a second. The monotonic clock stays right, as
    it does when somebody sets a clock. Python's time.sleep fails in such a process; asyncio's does not."""
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset_file),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def set_offset(offset_file: Path, offset_sec: int) -> None:
    """From now on the clock is ahead by so much, or behind."""
    new = offset_file.with_suffix(".new")
    new.write_text(f"{offset_sec:+d}\n")
    new.replace(offset_file)  # nobody reads half of it


def remove_shared_memory() -> None:
    """Removes the shared memory that killed processes have left."""
    for left in _SHARED_MEMORY.glob("*faketime_s*_*"):
        if not Path("/proc", left.name.rpartition("_")[2]).exists():
            left.unlink(missing_ok=True)


def _find() -> Path | None:
    patterns = (_LIBRARY, f"*/{_LIBRARY}")
    return next((path for where in _DIRECTORIES for one in patterns for path in where.glob(one)), None)
