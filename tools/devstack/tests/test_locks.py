from pathlib import Path

import pytest

from devstack import locks

ROOT = """
[project]
name = "workspace"
dependencies = ["ours"]
[dependency-groups]
dev = ["Tool.Kit>=2"]
[tool.uv.workspace]
members = ["shared", "services/*"]
"""
OURS = '[project]\nname = "ours"\ndependencies = ["library[extra]>=1.5"]\n'


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    (tmp_path / "requirements").mkdir()
    (tmp_path / "shared").mkdir()
    (tmp_path / "pyproject.toml").write_text(ROOT)
    (tmp_path / "shared" / "pyproject.toml").write_text(OURS)
    for service in locks.SERVICES:
        (tmp_path / "services" / service).mkdir(parents=True)
        (tmp_path / "services" / service / "pyproject.toml").write_text(
            f'[project]\nname = "{service}"\ndependencies = ["ours"]\n'
        )
        (tmp_path / "requirements" / f"{service}.txt").write_text("library[extra]==1.6 \\\n    --hash=sha256:0\n")
    (tmp_path / "requirements" / "dev.txt").write_text("library==1.6 ; python_version > '3'\ntool-kit==2.0 \\\n")
    return tmp_path


def test_locks_with_all_requirements_are_valid(clone: Path) -> None:
    assert list(locks.find_problems(clone)) == []


def test_a_missing_pin_is_reported_with_its_file(clone: Path) -> None:
    (clone / "requirements" / "reaper.txt").write_text("other==1.0\n")

    assert list(locks.find_problems(clone)) == ["requirements/reaper.txt lacks library[extra]>=1.5"]


def test_a_pin_outside_the_range_is_reported(clone: Path) -> None:
    (clone / "shared" / "pyproject.toml").write_text(OURS.replace(">=1.5", ">=1.7"))

    assert any("but library[extra]>=1.7 is required" in line for line in locks.find_problems(clone))


def test_the_requirements_of_a_used_extra_are_checked(clone: Path) -> None:
    extra = '[project.optional-dependencies]\ndatabase = ["driver>=1"]\n'
    (clone / "shared" / "pyproject.toml").write_text(OURS + extra)
    assert list(locks.find_problems(clone)) == []
    reaper = '[project]\nname = "reaper"\ndependencies = ["ours[database]"]\n'
    (clone / "services" / "reaper" / "pyproject.toml").write_text(reaper)

    assert "requirements/reaper.txt lacks driver>=1" in list(locks.find_problems(clone))
