"""Servers of another Debian release. `make test-versions` prepares and uses real ones."""

from pathlib import Path

import pytest

from devstack import debian_servers, versions
from devstack.debian_servers import ServerPrograms
from devstack.errors import CannotRun

OTHER = "https://other.example/apt Other Other"
DEBIAN = "https://debian.example/debian Debian Debian"
SECURITY = "https://debian.example/security Debian Debian-Security"


def use_apt_sources(monkeypatch: pytest.MonkeyPatch, directory: Path, *lines: str) -> None:
    apt_get = directory / "apt-get"
    apt_get.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    apt_get.chmod(0o755)
    monkeypatch.setenv("PATH", str(directory), prepend=":")


@pytest.mark.usefixtures("server_programs")
def test_the_archive_comes_from_the_apt_sources_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use_apt_sources(monkeypatch, tmp_path, OTHER, SECURITY, DEBIAN)
    assert debian_servers._find_archive() == "https://debian.example/debian"


@pytest.mark.usefixtures("server_programs")
def test_apt_sources_without_debian_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use_apt_sources(monkeypatch, tmp_path, OTHER)
    with pytest.raises(CannotRun, match="no archive of Debian"):
        debian_servers._find_archive()


def test_prepared_servers_are_used_again(tmp_path: Path) -> None:
    root = tmp_path / "bookworm"
    postgres, rabbitmq = root / "usr/lib/postgresql/15/bin", root / "usr/lib/rabbitmq/bin"
    for directory in (postgres, rabbitmq):
        directory.mkdir(parents=True)
    programs = debian_servers.prepare("bookworm", tmp_path, patchelf="/nonexistent")
    assert programs == ServerPrograms(postgres, rabbitmq)


def test_an_incomplete_directory_is_reported(tmp_path: Path) -> None:
    (tmp_path / "bookworm").mkdir()
    with pytest.raises(CannotRun, match="remove the directory"):
        debian_servers.prepare("bookworm", tmp_path, patchelf="/nonexistent")


def test_prepared_servers_need_a_directory_that_keeps_them(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        versions.main(["--prepare"])
    assert "--servers DIRECTORY" in capsys.readouterr().err
