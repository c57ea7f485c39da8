"""Kubernetes' own schemas, strict: a field that does not exist is a mistake."""

import json
from collections.abc import Iterator, Sequence
from functools import cache

import kubernetes_validate

from k8s_check.manifests import Manifest, title

SUPPORTED_MINORS = 3
"""Kubernetes mends its three newest minor versions."""

_MAJOR, _MINOR = (int(part) for part in kubernetes_validate.latest_version().split(".")[:2])
VERSIONS = (f"{_MAJOR}.{_MINOR - SUPPORTED_MINORS + 1}", f"{_MAJOR}.{_MINOR}")
"""The oldest and the newest that are supported, as the locked schemas know them."""

OPERATORS = {"postgresql.cnpg.io/v1", "rabbitmq.com/v1beta1", "keda.sh/v1alpha1", "monitoring.coreos.com/v1"}
"""Their kinds have schemas in the cluster, and none here (crds.py)."""


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    for manifest in manifests:
        if manifest["apiVersion"] in OPERATORS:
            continue
        for version in VERSIONS:
            if (problem := _problem(json.dumps(manifest), version)) is not None:
                yield f"{title(manifest)}: Kubernetes {version} {problem}"


@cache
def _problem(manifest: str, version: str) -> str | None:
    """As JSON: most manifests are the same in every overlay, and their schemas take long to read."""
    read = json.loads(manifest)
    try:
        kubernetes_validate.validate(read, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"refuses {'.'.join(str(part) for part in error.path)}: {error.message}"
    except kubernetes_validate.SchemaNotFoundError:
        return f"has no {read['apiVersion']} {read['kind']}"
    return None
