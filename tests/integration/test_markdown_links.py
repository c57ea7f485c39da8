"""Markdown: relative links lead to existing files, and their anchors to existing headings."""

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.integration.stack import ROOT

LINK = re.compile(r"\]\(([^()\s]+)\)")
FENCED_CODE = re.compile(r"^ *```.*?^ *```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#{1,6} +(.+?) *#*$", re.MULTILINE)


def pages() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return [page for page in listed.stdout.splitlines() if (ROOT / page).exists()]


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub gives the headings of a page."""
    counts: Counter[str] = Counter()
    result: set[str] = set()
    for heading in HEADING.findall(FENCED_CODE.sub("", page.read_text())):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        result.add(f"{anchor}-{counts[anchor]}" if counts[anchor] else anchor)
        counts[anchor] += 1
    return result


def broken_links(page: Path) -> list[str]:
    text = FENCED_CODE.sub("", page.read_text())
    broken: list[str] = []
    for link in LINK.findall(text):
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and target.suffix == ".md" and anchor not in anchors(target)):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", pages())
def test_links_and_anchors_resolve(page: str) -> None:
    assert broken_links(ROOT / page) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `title`, twice\n\n```\n# no heading\n```\n\n## A title twice\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[1](other.md) [2](other.md#a-title-twice-1) [3](https://example.com/) "
        "[4](missing.md) [5](other.md#no-heading) [6](#here)\n"
    )
    assert broken_links(page) == ["missing.md", "other.md#no-heading", "#here"]
