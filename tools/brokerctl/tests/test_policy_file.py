"""Policy file: lines of values and errors."""

from pathlib import Path
from typing import Any

import pytest

from brokerctl.errors import Misconfigured, Refused
from brokerctl.policy_file import PolicyFile, format_policies, read_policy_file

FILE = """\
# Labs of the spring
- name: adventure
  match: {track_name: lab-adventure}
  lease_hours: 8
- name: 2026-01-01
  stock:
    name_prefix: lab-
    min: 20
    colour: red
"""


def read(folder: Path, text: str) -> PolicyFile:
    path = folder / "policies.yaml"
    path.write_text(text)
    return read_policy_file(path)


def test_the_content_is_read(tmp_path: Path) -> None:
    policies: list[Any] = [
        {"name": "adventure", "match": {"track_name": "lab-adventure"}, "lease_hours": 8},
        {"name": "2026-01-01", "stock": {"name_prefix": "lab-", "min": 20, "colour": "red"}},
    ]
    assert read(tmp_path, FILE).policies == policies
    assert read(tmp_path, format_policies(policies)).policies == policies
    assert read(tmp_path, '{"policies": [{"name": "a"}]}').policies == [{"name": "a"}]
    assert read(tmp_path, format_policies([])).policies == []


@pytest.mark.parametrize(
    ("field", "line"),
    [
        ("body", 2),
        ("policies", 2),
        ("policies.0", 2),
        ("policies.0.match", 3),
        ("policies.0.match.track_name", 3),
        ("policies.0.lease_hours", 4),
        ("policies.1.name", 5),
        ("policies.1.stock", 6),
        ("policies.1.stock.colour", 9),
        ("policies.1.stock.max", 6),
        ("policies.7.name", 2),
    ],
)
def test_a_field_has_the_line_of_its_value_or_of_the_value_around_it(tmp_path: Path, field: str, line: int) -> None:
    assert read(tmp_path, FILE).find_line(field) == line


def test_an_error_of_the_broker_names_the_lines(tmp_path: Path) -> None:
    file = read(tmp_path, FILE)
    fields = [
        {"field": "policies.1.stock.max", "problem": "is missing"},
        {"field": "policies.0.lease_hours", "problem": "must be a number"},
    ]
    error = file.locate(Refused("message", detail={"code": "INVALID_POLICY", "fields": fields}))
    assert error.lines == [
        f"{file.name}:4: policies.0.lease_hours: must be a number",
        f"{file.name}:6: policies.1.stock.max: is missing",
    ]
    assert [field["line"] for field in error.detail["fields"]] == [4, 6]
    other = Refused("message", detail={"code": "INVALID_REQUEST"})
    assert file.locate(other) is other


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("- name: a\n  name: b\n", ":2: name is set twice, first in line 1"),
        ("- name: a\n  match: [\n", ":3: "),
        ("name: a\n", ":1: must be a list"),
        ("policies: 7\n", ":1: must be a list"),
        ("- lease_hours: .inf\n", "without a form in JSON"),
        ("- name: !!python/object:os.system a\n", ":1: "),
        ("- a: &a [*a]\n", "without a form in JSON"),
    ],
)
def test_a_file_that_is_no_list_of_policies_is_refused_with_its_line(
    tmp_path: Path, text: str, problem: str
) -> None:
    with pytest.raises(Misconfigured, match=r"policies\.yaml") as caught:
        read(tmp_path, text)
    assert problem in caught.value.message


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(Misconfigured, match="No such file"):
        read_policy_file(tmp_path / "none.yaml")
