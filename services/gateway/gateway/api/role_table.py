"""Table of the routes with their roles, in docs/security.md between two comments.

`python -m gateway.api.role_table FILE` writes it into the file. With `--check` it only compares.
"""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gateway.web import roles
from sandbox_broker.contract.tokens import Role

BEGIN, END = "<!-- begin of the generated table of roles -->", "<!-- end of the generated table of roles -->"
_COLUMNS: tuple[Role, ...] = ("track", "viewer", "operator", "admin")


def permitted_roles(method: str, path: str) -> tuple[str, ...]:
    """Return the roles that may use the route. `path` is its template."""
    if path.startswith("/v1/admin"):
        required = roles.required_role(method, path)
        return tuple(role for role in _COLUMNS if roles.is_permitted(role, required))
    return tuple(role for role in _COLUMNS if role in roles.TRACK_ROLES)


def build_table(document: Mapping[str, Any]) -> str:
    """Return the table for an OpenAPI document."""
    lines = [f"| route | {' | '.join(_COLUMNS)} |", f"| --- |{' --- |' * len(_COLUMNS)}"]
    for method, path in list_routes(document):
        permitted = permitted_roles(method, path)
        cells = " | ".join("yes" if role in permitted else "no" for role in _COLUMNS)
        lines.append(f"| `{method} {path}` | {cells} |")
    return "\n".join(lines)


def list_routes(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the method and the template of each route that needs a token, in the order of the document."""
    for path, operations in document["paths"].items():
        if path.startswith("/v1/") and not path.startswith("/v1/instruqt/"):
            yield from ((method.upper(), path) for method in operations)


def replace_table(text: str, table: str) -> str:
    """Return the text with the table between the comments."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def _document() -> Mapping[str, Any]:
    from gateway.main import create_app  # noqa: PLC0415 (main imports the docs, which use this module)
    from gateway.settings import Settings  # noqa: PLC0415

    settings = Settings(
        _env_file=None,
        amqp_url="amqp://127.0.0.1/",
        database_url="postgresql://127.0.0.1/none",
        broker_api_token="x" * 12,
        broker_admin_token="y" * 12,
    )
    return create_app(settings).openapi()


def main() -> None:
    path = Path(sys.argv[1])
    before = path.read_text()
    after = replace_table(before, build_table(_document()))
    if "--check" in sys.argv:
        sys.exit("run make docs" if before != after else 0)
    path.write_text(after)


if __name__ == "__main__":
    main()
