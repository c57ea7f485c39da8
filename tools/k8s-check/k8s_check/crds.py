"""What operators add to Kubernetes, judged by their CustomResourceDefinitions. An operator's release has those, and
a cluster (`kubectl get crds -o yaml`), but no package that could be locked: whoever has them names the files."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from k8s_check.manifests import Manifest, title
from k8s_check.schemas import OPERATORS

Schema = dict[str, Any]
Schemas = Mapping[tuple[str, str], Schema]
"""By apiVersion and kind."""


def load(files: Sequence[Path]) -> Schemas:
    return {
        (f"{definition['spec']['group']}/{version['name']}", definition["spec"]["names"]["kind"]): _strict(
            version["schema"]["openAPIV3Schema"]
        )
        for file in files
        for document in yaml.safe_load_all(file.read_text())
        for definition in _definitions(document)
        for version in definition["spec"]["versions"]
    }


def _definitions(document: Any) -> list[Mapping[str, Any]]:
    """A file has them one by one, what kubectl writes is a list of them; there may be other things in both."""
    found = document.get("items", [document]) if document else []
    return [one for one in found if one["kind"] == "CustomResourceDefinition"]


def problems(manifests: Sequence[Manifest], schemas: Schemas) -> Iterator[str]:
    for manifest in manifests:
        if manifest["apiVersion"] not in OPERATORS:
            continue
        schema = schemas.get((manifest["apiVersion"], manifest["kind"]))
        if schema is None:
            yield f"{title(manifest)}: no definition of {manifest['apiVersion']} {manifest['kind']} was given"
            continue
        for error in Draft202012Validator(schema).iter_errors(manifest):
            where = ".".join(str(part) for part in error.path)
            yield f"{title(manifest)}: its operator refuses {where}: {error.message}"


def _strict(schema: Schema) -> Schema:
    """As a cluster reads it, but for fields that do not exist: those it would drop without a word."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _strict(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    for inner in ("items", "additionalProperties"):
        if isinstance(schema.get(inner), dict):
            strict[inner] = _strict(schema[inner])
    if schema.get("nullable"):
        return {"anyOf": [{"type": "null"}, strict]}
    return strict
