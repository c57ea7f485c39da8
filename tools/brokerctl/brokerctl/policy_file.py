"""Policy file: YAML with the line of each value, so that an error of the broker names a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from brokerctl.errors import Misconfigured, Refused

MAX_BYTES = 1 << 20
TEXT_TAG = "tag:yaml.org,2002:str"


class _Loader(yaml.SafeLoader):
    """Reads dates as text, because JSON has no dates."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class PolicyFile(NamedTuple):
    name: str
    policies: list[Any]
    root: yaml.Node
    """Node of the list of policies."""

    def find_line(self, field: str) -> int:
        """Return the line of a field like `policies.0.stock.min`, or of the closest value around it."""
        node, line = self.root, _line_of(self.root)
        for part in field.split(".")[1:]:
            if isinstance(node, yaml.SequenceNode) and part.isdigit() and int(part) < len(node.value):
                node = node.value[int(part)]
                line = _line_of(node)
            elif isinstance(node, yaml.MappingNode) and (found := _find_entry(node, part)) is not None:
                key, node = found
                line = _line_of(key)
            else:
                break
        return line

    def locate(self, error: Refused) -> Refused:
        """Return the error with the line of each problem, one problem per line."""
        fields = error.detail.get("fields")
        if error.code != "INVALID_POLICY" or not isinstance(fields, list):
            return error
        located = [{**field, "line": self.find_line(str(field.get("field", "")))} for field in fields]
        located.sort(key=lambda field: int(field["line"]))
        lines = [f"{self.name}:{field['line']}: {field['field']}: {field['problem']}" for field in located]
        message = "No policy was applied. Correct the file:"
        return Refused(message, detail={**error.detail, "message": message, "fields": located}, lines=lines)


def read_policy_file(path: Path) -> PolicyFile:
    """Read a list of policies, or an object with the field `policies`. Raises Misconfigured with the line."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise Misconfigured(f"{path} cannot be read ({error.strerror}). Check the path.") from None
    if len(text) > MAX_BYTES:
        raise Misconfigured(f"{path} has more than {MAX_BYTES >> 20} MiB. Give a file with policies.")
    loader = _Loader(text)
    try:
        root = loader.get_single_node()
        if root is None:
            raise Misconfigured(f"{path} is empty. Write [] to remove all policies.")
        for line, problem in _find_repeated_keys(root):
            raise Misconfigured(f"{path}:{line}: {problem}")
        content = loader.construct_document(root)
        json.dumps(content, allow_nan=False)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
        place = f"{path}:{mark.line + 1}" if mark is not None else str(path)
        raise Misconfigured(f"{place}: {getattr(error, 'problem', None) or error}. Correct the YAML.") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise Misconfigured(f"{path} has a value without a form in JSON: {error}. Correct the value.") from None
    finally:
        loader.dispose()
    if isinstance(content, dict) and content.keys() == {"policies"}:
        content, root = content["policies"], root.value[0][1]
    if not isinstance(content, list):
        raise Misconfigured(f"{path}:1: must be a list of policies, each like - name: adventure")
    return PolicyFile(str(path), content, root)


def format_policies(policies: list[dict[str, Any]]) -> str:
    """Return the policies as YAML that `read_policy_file` reads."""
    if not policies:
        return "# No policies: all labs have the defaults of the settings.\n[]\n"
    text: str = yaml.safe_dump(policies, sort_keys=False, allow_unicode=True)
    return text


def _line_of(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _find_entry(node: yaml.MappingNode, name: str) -> tuple[yaml.Node, yaml.Node] | None:
    return next(((key, value) for key, value in node.value if str(key.value) == name), None)


def _find_repeated_keys(node: yaml.Node) -> Iterator[tuple[int, str]]:
    """Yield the line and the problem of keys that stand twice in an object. YAML itself takes the last one."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _find_repeated_keys(item)
    elif isinstance(node, yaml.MappingNode):
        first_lines: dict[str, int] = {}
        for key, value in node.value:
            line = _line_of(key)
            if key.tag == TEXT_TAG and first_lines.setdefault(key.value, line) != line:
                yield line, f"{key.value} is set twice, first in line {first_lines[key.value]}. Remove one."
            yield from _find_repeated_keys(value)
