"""Kubernetes' own schemas, strict: a field that does not exist is a mistake."""

from collections.abc import Iterator, Sequence

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
            try:
                kubernetes_validate.validate(manifest, version, strict=True)
            except kubernetes_validate.ValidationError as error:
                where = ".".join(str(part) for part in error.path)
                yield f"{title(manifest)}: Kubernetes {version} refuses {where}: {error.message}"
            except kubernetes_validate.SchemaNotFoundError:
                yield f"{title(manifest)}: Kubernetes {version} has no {manifest['apiVersion']} {manifest['kind']}"
