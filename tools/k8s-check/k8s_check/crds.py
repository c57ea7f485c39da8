"""Validation of custom resources against CustomResourceDefinitions.

The definitions come from an operator's release or from a cluster (`kubectl get crds -o yaml`). The caller names the
files, because the locked requirements can contain packages only.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonschema import Draft202012Validator

from k8s_check.manifests import Manifest, format_title
from k8s_check.operators import API_VERSIONS

Schema = dict[str, Any]
Schemas = Mapping[tuple[str, str], Schema]
"""Schemas by apiVersion and kind."""


def load_resources(files: Sequence[Path]) -> list[Mapping[str, Any]]:
    """Load the resources in YAML files. A document is one resource, or a list of them as kubectl prints it."""
    return [
        resource
        for file in files
        for document in yaml.safe_load_all(file.read_text())
        if document
        for resource in document.get("items", [document])
    ]


def build_schemas(resources: Sequence[Mapping[str, Any]]) -> Schemas:
    return {
        (
            f"{definition['spec']['group']}/{version['name']}",
            definition["spec"]["names"]["kind"],
        ): _forbid_unknown_fields(version["schema"]["openAPIV3Schema"])
        for definition in resources
        if definition["kind"] == "CustomResourceDefinition"
        for version in definition["spec"]["versions"]
    }


def find_problems(manifests: Sequence[Manifest], schemas: Schemas) -> Iterator[str]:
    for manifest in manifests:
        if manifest["apiVersion"] not in API_VERSIONS:
            continue
        schema = schemas.get((manifest["apiVersion"], manifest["kind"]))
        if schema is None:
            yield f"{format_title(manifest)}: --crds has no {manifest['apiVersion']} {manifest['kind']}"
            continue
        for error in Draft202012Validator(schema).iter_errors(manifest):
            path = ".".join(str(part) for part in error.path)
            yield f"{format_title(manifest)}: its definition rejects {path}: {error.message}"


def _forbid_unknown_fields(schema: Schema) -> Schema:
    """Convert a CRD schema to JSON Schema without unknown fields, because a cluster drops those silently."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    strict = dict(schema)
    if "properties" in schema:
        strict["properties"] = {name: _forbid_unknown_fields(value) for name, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            strict.setdefault("additionalProperties", False)
    for keyword in ("items", "additionalProperties"):
        if isinstance(schema.get(keyword), dict):
            strict[keyword] = _forbid_unknown_fields(schema[keyword])
    if schema.get("nullable"):
        return {"anyOf": [{"type": "null"}, strict]}
    return strict
