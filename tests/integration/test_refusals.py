"""The services refuse commands by code and parameters, and the error table of the gateway words each refusal."""

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.api.error_table import ERRORS

ROOT = Path(__file__).parents[2]
SOURCES = [
    *(ROOT / "services").glob("*/[!t]*/**/*.py"),
    *(ROOT / "shared/sandbox_broker").rglob("*.py"),
]


def find_refusals() -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield place, code and parameters of each call of `refuse`. Parameters that vary get their name as value."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "refuse":
                yield (
                    f"{path.relative_to(ROOT)}:{node.lineno}",
                    literal(node.args[0]),
                    {
                        str(keyword.arg): literal(keyword.value) if keyword.arg == "cause" else f"<{keyword.arg}>"
                        for keyword in node.keywords
                    },
                )


def literal(node: ast.expr) -> Any:
    assert isinstance(node, ast.Constant), ast.dump(node)
    return node.value


REFUSALS = list(find_refusals())


def test_the_refusals_are_found() -> None:
    assert len(REFUSALS) > 15


@pytest.mark.parametrize(("place", "code", "parameters"), REFUSALS, ids=[place for place, *_ in REFUSALS])
def test_the_message_of_each_refusal_states_its_parameters(
    place: str, code: str, parameters: dict[str, str]
) -> None:
    if code == "INVALID_COMMAND":  # a defect of the broker: the gateway answers INTERNAL_ERROR
        return
    spec = ERRORS[code]
    # Without messages, the wording is the meaning and the advice of the code.
    assert parameters.get("cause", "") in {"", *spec.messages}
    message = spec.word(parameters)
    for name, value in parameters.items():
        assert name == "cause" or value in message, (name, message)


def test_services_send_no_wording_of_their_own() -> None:
    """Only `refuse` creates a refusal, so no service can add a message."""
    for path in SOURCES:
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        made = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Refused"]
        # `Refused` of the console is an exception, not a reply.
        assert not made or path.name == "replies.py" or "console" in path.parts, path
