"""README: the files, functions and make targets that it names exist."""

import ast
import re
from collections.abc import Iterator

import pytest

from tests.integration.stack import ROOT

README = (ROOT / "README.md").read_text()
CODE = re.compile(r"`([^`\n]+)`")
PYTHON_FILE = re.compile(r"[\w./-]+\.py")
FUNCTION = re.compile(r"([\w.]+)\(\)")


def walk() -> str:
    """Return the section with the walk through the code."""
    return README.split("\n## A walk through the code", 1)[1].split("\n## ", 1)[0]


def named_functions() -> list[tuple[str, str]]:
    """Return (file, function) for each `function()` of the walk. The file is the last one named before it."""
    pairs: list[tuple[str, str]] = []
    file = ""
    for code in CODE.findall(walk()):
        if PYTHON_FILE.fullmatch(code):
            file = code
        elif function := FUNCTION.fullmatch(code):
            pairs.append((file, function[1]))
    return pairs


def defined_functions(file: str) -> set[str]:
    """Return the functions of a file by qualified name, for example `Consumer.run`."""
    return set(_functions(ast.parse((ROOT / file).read_text()), ""))


def _functions(node: ast.AST, prefix: str) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _functions(child, f"{prefix}{child.name}.")
        elif isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield f"{prefix}{child.name}"


def test_the_walk_goes_from_the_gateway_to_the_allocator_and_back() -> None:
    services = [file.split("/")[1] for file, _ in named_functions() if file.startswith("services/")]
    assert services[0] == services[-1] == "gateway"
    assert "allocator" in services


@pytest.mark.parametrize(("file", "function"), named_functions())
def test_each_function_of_the_walk_exists(file: str, function: str) -> None:
    assert function in defined_functions(file)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_each_named_path_and_target_exists(page: str) -> None:
    text = (ROOT / page).read_text()
    targets = set(re.findall(r"^([a-z][a-z0-9-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named_targets = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)", "\n".join(code_of(text))))
    assert named_targets
    assert named_targets <= targets
    paths = [code for code in CODE.findall(text) if re.fullmatch(r"[\w.-]+(/[\w.-]+)*/?", code) and "/" in code]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def code_of(text: str) -> list[str]:
    """Return the code blocks and inline code of a page."""
    blocks = re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)
    return blocks + CODE.findall(re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
