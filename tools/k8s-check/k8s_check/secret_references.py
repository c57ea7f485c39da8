"""Secrets that the manifests refer to, and the ExternalSecrets that provide them."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s_check.manifests import Manifest, list_pod_templates, select_kind

CERTIFICATES = frozenset({"postgres-ca", "rabbitmq-tls"})
"""Secrets of certificates. CloudNativePG and the issuer of certificates create them."""

_LOGIN = ("username", "password")


def list_secret_keys(manifests: Sequence[Manifest]) -> dict[str, set[str]]:
    """Return the keys that the manifests require of each secret, by its name, without certificates.

    Optional keys are left out, because an installation works without them.
    """
    keys: defaultdict[str, set[str]] = defaultdict(set)
    for name, key in _list_references(manifests):
        if name not in CERTIFICATES:
            keys[name].add(key)
    return dict(keys)


def _list_references(manifests: Sequence[Manifest]) -> Iterator[tuple[str, str]]:
    for pod in list_pod_templates(manifests):
        for container in pod.containers:
            for variable in container.get("env", []):
                reference = variable.get("valueFrom", {}).get("secretKeyRef")
                if reference is not None and not reference.get("optional", False):
                    yield reference["name"], reference["key"]
    for cluster in select_kind(manifests, "Cluster"):
        names = [cluster["spec"]["bootstrap"]["initdb"]["secret"]["name"]]
        names += [role["passwordSecret"]["name"] for role in cluster["spec"]["managed"]["roles"]]
        yield from ((name, key) for name in names for key in _LOGIN)
    for user in select_kind(manifests, "User"):
        yield from ((user["spec"]["importCredentialsSecret"]["name"], key) for key in _LOGIN)
    for authentication in select_kind(manifests, "TriggerAuthentication"):
        targets: Sequence[Mapping[str, Any]] = authentication["spec"]["secretTargetRef"]
        yield from ((target["name"], target["key"]) for target in targets)


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Compare the ExternalSecrets with the references, if there are any."""
    provided = {manifest["metadata"]["name"] for manifest in select_kind(manifests, "ExternalSecret")}
    if not provided:
        return
    needed = set(list_secret_keys(manifests))
    yield from (
        f"ExternalSecret {name}: does not exist, but the manifests refer to it"
        for name in sorted(needed - provided)
    )
    yield from (f"ExternalSecret {name}: no manifest refers to its secret" for name in sorted(provided - needed))
