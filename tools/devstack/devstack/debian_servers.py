"""PostgreSQL and RabbitMQ of another Debian release, beside those of the machine.

The packages are extracted into a directory and not installed. Their programs then use the libraries of this
directory, so they need no container, and they run under any account. The archive is the one of the machine's own
apt sources.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from devstack.errors import CannotRun

_DOWNLOAD_SEC = 900.0
_EXTRACT_SEC = 60.0
_EXTRACTED = ("lib", "erlang-", "postgresql-", "rabbitmq-server_")
"""Beginnings of the file names of required packages. The programs of other dependencies come from the machine."""
_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_ERLANG = Path("usr/lib/erlang")
_ERLANG_PROGRAMS = ("erl", "epmd", "escript")


@dataclass(frozen=True, slots=True)
class ServerPrograms:
    """Directories of the servers' programs, for POSTGRES_BIN_DIR and RABBITMQ_BIN_DIR."""

    postgres: Path
    rabbitmq: Path

    def describe(self) -> str:
        """Return the versions of both servers."""
        postgres = _call([self.postgres / "postgres", "--version"]).split("(PostgreSQL)")[1].split()[0]
        rabbitmq = next(self.rabbitmq.parent.glob("lib/rabbitmq_server-*")).name.partition("-")[2]
        return f"PostgreSQL {postgres}, RabbitMQ {rabbitmq}"

    @property
    def environment(self) -> dict[str, str]:
        return {"POSTGRES_BIN_DIR": str(self.postgres), "RABBITMQ_BIN_DIR": str(self.rabbitmq)}


def prepare(suite: str, directory: Path, *, patchelf: str) -> ServerPrograms:
    """Download and extract the servers of a Debian suite, such as `bookworm` or `testing`, below `directory`.

    Existing servers there are used unchanged. `patchelf` is the path of this program. Raises CannotRun without
    access to Debian's archive.
    """
    root = directory / suite
    if not root.exists():
        new = directory / f"{suite}.new"
        shutil.rmtree(new, ignore_errors=True)
        directory.mkdir(parents=True, exist_ok=True)
        _extract(_download(suite, new / "apt"), new)
        shutil.rmtree(new / "apt")
        _relocate(new, root, patchelf)
        new.rename(root)
    programs = _find_programs(root)
    if programs is None:
        raise CannotRun(f"the packages of {suite} in {root} do not contain both servers; remove the directory")
    return programs


def _download(suite: str, apt: Path) -> list[Path]:
    """Download the packages of both servers and of their dependencies."""
    if shutil.which("apt-get") is None or not _KEYRING.exists():
        raise CannotRun("apt-get and Debian's archive keyring are required for the servers of another release")
    options = _apt_options(apt)
    (apt / "sources.list").write_text(f"deb [signed-by={_KEYRING}] {_find_archive()} {suite} main\n")
    _call(["apt-get", *options, "-q", "update"])
    depends = (_call(["apt-cache", *options, "depends", "postgresql"])).split()
    postgres = next((word for word in depends if word.startswith("postgresql-")), "postgresql")
    # With an empty package database, all dependencies are downloaded, libraries of the machine included.
    install = ["install", "-q", "-y", "--download-only", "--no-install-recommends", "rabbitmq-server", postgres]
    _call(["apt-get", *options, *install])
    return sorted((apt / "cache" / "archives").glob("*.deb"))


def _apt_options(apt: Path) -> list[str]:
    """Return options for an apt that has its own sources, package database and cache below `apt`."""
    for part in ("state/lists/partial", "cache/archives/partial", "parts"):
        (apt / part).mkdir(parents=True)
    (apt / "status").touch()
    settings = {
        "Dir::Etc::sourcelist": apt / "sources.list",
        "Dir::Etc::sourceparts": apt / "parts",
        "Dir::Etc::preferences": apt / "preferences",
        "Dir::Etc::preferencesparts": apt / "parts",
        "Dir::State": apt / "state",
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt / "cache",
        "Acquire::Languages": "none",
        # The account _apt may not write here, and an account other than root cannot change to it.
        "APT::Sandbox::User": "root",
    }
    return [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]


def _find_archive() -> str:
    """Return the address of Debian's archive from the apt sources of the machine."""
    listed = _call(
        ["apt-get", "indextargets", "--format", "$(REPO_URI) $(ORIGIN) $(LABEL)", "Created-By: Packages"]
    )
    archives = [words[0] for line in listed.splitlines() if (words := line.split())[1:] == ["Debian", "Debian"]]
    if not archives:
        raise CannotRun("the apt sources of this machine have no archive of Debian; run apt-get update, or add one")
    return archives[0]


def _extract(archives: Sequence[Path], root: Path) -> None:
    for archive in archives:
        if archive.name.startswith(_EXTRACTED):
            _call(["dpkg-deb", "--extract", archive, root], timeout=_EXTRACT_SEC)


def _relocate(directory: Path, root: Path, patchelf: str) -> None:
    """Make the programs below `directory` work as files below `root`, with the libraries there."""
    loaders = [path for path in directory.glob("**/*-linux-gnu*/ld-linux*.so.*") if not path.is_symlink()]
    if len(loaders) != 1:
        raise CannotRun(f"the packages contain {len(loaders)} dynamic loaders instead of one", status=1)
    loader = root / loaders[0].relative_to(directory)
    libraries = f"{root}/lib/{loader.parent.name}:{root}/usr/lib/{loader.parent.name}"
    # A RUNPATH, patchelf's default, would not apply to the libraries of Erlang's and PostgreSQL's plug-ins.
    command: list[str | Path] = [patchelf, "--set-interpreter", loader, "--force-rpath", "--set-rpath", libraries]
    for program in _dynamic_programs(directory):
        _call([*command, program], timeout=_EXTRACT_SEC)
    for script in directory.glob(f"{_ERLANG}/**/bin/*"):
        if script.is_file() and not script.is_symlink() and script.read_bytes().startswith(b"#!"):
            script.write_text(script.read_text().replace(f"ROOTDIR=/{_ERLANG}", f"ROOTDIR={root / _ERLANG}"))
    for name in _ERLANG_PROGRAMS:
        (directory / "usr/lib/rabbitmq/bin" / name).symlink_to(root / _ERLANG / "bin" / name)
    # Also readable for the accounts of the servers.
    directory.chmod(0o755)


def _dynamic_programs(directory: Path) -> Iterator[Path]:
    """Yield the programs that the kernel starts through a dynamic loader."""
    for below in (directory / _ERLANG, directory / "usr/lib/postgresql"):
        for path in sorted(below.rglob("*")):
            # Plug-ins have no interpreter. Their names end in .so.
            if path.suffix == ".so" or path.is_symlink() or not path.is_file() or not os.access(path, os.X_OK):
                continue
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def _find_programs(root: Path) -> ServerPrograms | None:
    postgres = next(iter(sorted(root.glob("usr/lib/postgresql/*/bin"))), None)
    rabbitmq = root / "usr/lib/rabbitmq/bin"
    return None if postgres is None or not rabbitmq.exists() else ServerPrograms(postgres, rabbitmq)


def _call(command: Sequence[str | Path], *, timeout: float = _DOWNLOAD_SEC) -> str:
    """Return the output of a command. Raises CannotRun if it fails."""
    done = subprocess.run(
        command,
        env={**os.environ, "LC_ALL": "C"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode != 0:
        reason = " / ".join(done.stdout.splitlines()[-3:])
        raise CannotRun(f"{command[0]} ended with exit code {done.returncode}: {reason}", status=1)
    return done.stdout
