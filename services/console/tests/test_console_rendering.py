"""Text of the pages: times, sorting, and names with control characters, HTML or formulas."""

from collections.abc import AsyncIterator

import pytest

from console.csv_export import render_cell, render_csv
from console.rendering import (
    NONE,
    build_environment,
    format_age,
    format_duration,
    replace_control_characters,
    sort_rows,
)
from console.routes.signing_in import find_role, safe_path


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59, "59 s"),
        (61, "1 min 1 s"),
        (3600, "1 h"),
        (9000, "2 h 30 min"),
        (200_000, "2 d 7 h"),
        (None, NONE),
    ],
)
def test_a_duration_has_its_two_largest_units(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("at", "text"),
    [
        (1000, "now"),
        (940, "1 min ago"),
        (8200, "in 2 h"),
        (10_000, "in 2 h 30 min"),
        (None, "never"),
        (995, "5 s ago"),
    ],
)
def test_an_age_is_relative(at: float | None, text: str) -> None:
    assert format_age(at, now=1000) == text


def test_control_characters_of_names_are_replaced() -> None:
    assert replace_control_characters("a\x1b[31mb\u202ec\td") == "a�[31mb�c�d"
    assert replace_control_characters("two\nlines") == "two\nlines"


def test_html_in_names_is_escaped() -> None:
    template = build_environment().from_string('<a title="{{ name }}">{{ name }}</a>')
    html = template.render(name='"><script>alert(1)</script>')
    escaped = "&#34;&gt;&lt;script&gt;alert(1)&lt;/script&gt;"
    assert html == f'<a title="{escaped}">{escaped}</a>'


@pytest.mark.parametrize(
    ("value", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-1", "'-1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "'�=1"),
        ("\r=1", "'�=1"),
        ("plain-name", "plain-name"),
        (-5, "-5"),
        (None, ""),
    ],
)
def test_text_is_no_formula_in_csv(value: object, cell: str) -> None:
    assert render_cell(value) == cell


async def test_csv_quotes_separators() -> None:
    async def rows() -> AsyncIterator[dict[str, str]]:
        yield {"a": 'x,"y"', "b": "two\nlines"}

    assert "".join([line async for line in render_csv(("a", "b"), rows())]) == 'a,b\r\n"x,""y""",two�lines\r\n'


def test_rows_without_a_value_come_last_in_both_directions() -> None:
    rows = [{"n": 2}, {"n": None}, {"n": 1}]
    assert [row["n"] for row in sort_rows(rows, "n", ("n",))] == [1, 2, None]
    assert [row["n"] for row in sort_rows(rows, "-n", ("n",))] == [2, 1, None]
    assert sort_rows(rows, "other", ("n",)) == rows


@pytest.mark.parametrize(
    ("path", "safe"),
    [
        ("/leases?student=a", "/leases?student=a"),
        ("//evil.example", "/"),
        ("/\\evil.example", "/"),
        ("https://evil.example/", "/"),
        ("javascript:alert(1)", "/"),
        ("leases", "/"),
        ("/a\nb", "/"),
    ],
)
def test_a_sign_in_leads_to_this_console_only(path: str, safe: str) -> None:
    assert safe_path(path) == safe


def test_a_person_gets_the_role_with_the_most_rights() -> None:
    roles = {"teachers": "viewer", "ops": "operator", "root": "admin"}
    assert find_role(["teachers", "ops", "others"], roles) == "operator"  # type: ignore[arg-type]
    assert find_role("root", roles) == "admin"  # type: ignore[arg-type]
    assert find_role(["others", 7], roles) is None  # type: ignore[arg-type]
    assert find_role(None, roles) is None  # type: ignore[arg-type]
