import asyncio
from pathlib import Path

import pytest

from devstack import packages
from devstack.output import Terminal

pytest_plugins = ("devstack.fixtures",)

# Like apt-get, it fails while another instance runs.
APT_GET = """#!/bin/sh
mkdir "$BUSY" || exit 100
sleep 0.1
[ -e "$POLICY" ] && echo "$@" >>"$DONE"
rmdir "$BUSY"
"""


@pytest.mark.usefixtures("server_programs")
async def test_concurrent_installations_run_one_at_a_time(
    tmp_path: Path, terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apt-get").write_text(APT_GET)
    (tmp_path / "apt-get").chmod(0o755)
    policy = tmp_path / "policy-rc.d"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for name, path in (("BUSY", tmp_path / "busy"), ("DONE", tmp_path / "done"), ("POLICY", policy)):
        monkeypatch.setenv(name, str(path))
    monkeypatch.setattr(packages, "_POLICY", policy)
    monkeypatch.setattr(packages, "_DATABASE", tmp_path)

    await asyncio.gather(*(packages.install(name, terminal) for name in ("one", "two", "three")))

    installed = [line.split()[-1] for line in (tmp_path / "done").read_text().splitlines()]
    assert sorted(installed) == ["one", "three", "two", "update", "update", "update"]
    assert not policy.exists()
