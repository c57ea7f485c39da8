"""libfaketime, for tests that change the clock of a running process."""

from collections.abc import Mapping
from pathlib import Path

from devstack import packages
from devstack.errors import CannotRun
from devstack.output import Terminal

_LIBRARY = "faketime/libfaketimeMT.so.1"
_SHARED_MEMORY = Path("/dev/shm")
_DIRECTORIES = (Path("/usr/lib"), Path("/usr/local/lib"))


async def find_library(terminal: Terminal) -> Path:
    """Return the path of the library. Installs Debian's package if it is missing. Raises CannotRun."""
    found = _find()
    if found is None and packages.can_install():
        await packages.install("libfaketime", terminal)
        found = _find()
    if found is None:
        raise CannotRun("libfaketime not found: install it (Debian, Ubuntu: apt-get install libfaketime)")
    return found


def build_environment(library: Path, offset_file: Path) -> Mapping[str, str]:
    """Return the variables for a process whose clock has the offset in `offset_file`, read once per second.

    The monotonic clock stays correct, as after a real change of the clock. Python's time.sleep fails in such a
    process; asyncio.sleep works.
    """
    return {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(offset_file),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "NO_FAKE_STAT": "1",
    }


def set_offset(offset_file: Path, offset_sec: int) -> None:
    """Set the offset of the clock in seconds: positive is ahead, negative is behind."""
    new = offset_file.with_suffix(".new")
    new.write_text(f"{offset_sec:+d}\n")
    new.replace(offset_file)  # atomic, so a reader never sees a partial file


def remove_shared_memory() -> None:
    """Remove the shared memory left by killed processes."""
    for segment in _SHARED_MEMORY.glob("*faketime_s*_*"):
        if not Path("/proc", segment.name.rpartition("_")[2]).exists():
            segment.unlink(missing_ok=True)


def _find() -> Path | None:
    patterns = (_LIBRARY, f"*/{_LIBRARY}")
    return next(
        (path for directory in _DIRECTORIES for pattern in patterns for path in directory.glob(pattern)), None
    )
