"""`python -m devstack.locks`: check that the lock files pin every requirement of the pyproject files.

The check works offline and ignores indirect requirements. `make lock` resolves those.
"""

import re
import sys
import tomllib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from devstack.settings import ROOT

SERVICES = ("gateway", "allocator", "reaper", "csp-syncer", "provisioner", "console")
_PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^]]*\])?==([^\s;\\]+)", re.MULTILINE)


def main() -> int:
    problems = list(find_problems(ROOT))
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        print("`make lock` renews the locked requirements", file=sys.stderr)
    return 1 if problems else 0


def find_problems(root: Path) -> Iterator[str]:
    """Yield a line for each requirement without a pin or with a pin outside its range."""
    ours = {str(_project(path)["project"]["name"]): path for path in _packages(root)}
    for lock, path in _locks(root).items():
        pins = {canonicalize_name(name): version for name, version in _PINNED.findall(lock.read_text())}
        for requirement in _requirements(path, ours):
            pinned = pins.get(canonicalize_name(requirement.name))
            if pinned is None:
                yield f"{lock.relative_to(root)} lacks {requirement}"
            elif pinned not in requirement.specifier:
                yield f"{lock.relative_to(root)} pins {requirement.name} {pinned}, but {requirement} is required"


def _locks(root: Path) -> dict[Path, Path]:
    """Return each lock file with its pyproject file."""
    services = {
        root / "requirements" / f"{name}.txt": root / "services" / name / "pyproject.toml" for name in SERVICES
    }
    return {**services, root / "requirements" / "dev.txt": root / "pyproject.toml"}


def _packages(root: Path) -> Iterator[Path]:
    for pattern in _project(root / "pyproject.toml")["tool"]["uv"]["workspace"]["members"]:
        yield from (folder / "pyproject.toml" for folder in root.glob(pattern))


def _requirements(path: Path, ours: dict[str, Path], extras: Collection[str] = ()) -> Iterator[Requirement]:
    """Yield the requirements of a project, of its development group and of the workspace packages it uses."""
    project = _project(path)
    declared = [
        *project["project"].get("dependencies", []),
        *project.get("dependency-groups", {}).get("dev", []),
    ]
    for extra in sorted(extras):
        declared += project["project"]["optional-dependencies"][extra]
    for requirement in map(Requirement, declared):
        if requirement.name in ours:
            yield from _requirements(ours[requirement.name], ours, requirement.extras)
        else:
            yield requirement


def _project(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


if __name__ == "__main__":
    raise SystemExit(main())
