"""Validation against Kubernetes' own schemas. It is strict: unknown fields are problems."""

import json
from collections.abc import Iterator, Sequence
from functools import cache

import kubernetes_validate
from kubernetes_validate import utils

from k8s_check import operators
from k8s_check.manifests import Manifest, format_title

SUPPORTED_MINORS = 3
"""Kubernetes maintains its three newest minor versions."""

_MAJOR, _MINOR = (int(part) for part in kubernetes_validate.latest_version().split(".")[:2])
VERSIONS = (f"{_MAJOR}.{_MINOR - SUPPORTED_MINORS + 1}", f"{_MAJOR}.{_MINOR}")
"""The oldest and the newest maintained version, counted from the newest version of the locked schemas."""

utils.schema_contents = cache(utils.schema_contents)  # the library reads all definitions for each manifest


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        if manifest["apiVersion"] in operators.API_VERSIONS:
            continue  # the module `crds` validates these
        for version in VERSIONS:
            if (problem := _validate(json.dumps(manifest), version)) is not None:
                yield f"{format_title(manifest)}: Kubernetes {version} {problem}"


@cache
def _validate(manifest_json: str, version: str) -> str | None:
    """Return the first problem. JSON is hashable, so manifests shared by overlays are validated only once."""
    manifest = json.loads(manifest_json)
    try:
        kubernetes_validate.validate(manifest, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"rejects {'.'.join(str(part) for part in error.path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        return f"has no {manifest['apiVersion']} {manifest['kind']}"
    return None
