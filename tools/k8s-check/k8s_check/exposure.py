"""Exposure: routes of the gateway that the Ingresses publish, but must not."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s_check.manifests import Manifest, format_title, select_kind

ADMIN_PATH = "/v1/admin/status"
"""Example of a route of the admin API. The checks use it for the whole admin API."""
INTERNAL_PATHS = ("/metrics", "/healthz", "/readyz")

_ALLOW_LIST_ANNOTATIONS = (
    "nginx.ingress.kubernetes.io/whitelist-source-range",
    "nginx.ingress.kubernetes.io/allowlist-source-range",
)


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    ingresses = list(select_kind(manifests, "Ingress"))
    for ingress in ingresses:
        yield from (
            f"{format_title(ingress)}: {route} must stay inside the cluster"
            for route in INTERNAL_PATHS
            if _is_published(ingress, route)
        )
    restricted = [ingress for ingress in ingresses if _has_allow_list(ingress)]
    for ingress in ingresses:
        if restricted and ingress not in restricted and _is_published(ingress, ADMIN_PATH):
            yield (
                f"{format_title(ingress)}: publishes the admin API without the allow-list of "
                f"{format_title(restricted[0])}"
            )


def is_path_match(path: Mapping[str, Any], route: str) -> bool:
    """Match a path of an Ingress against a route, as Kubernetes defines it for `Exact` and `Prefix`."""
    if path["pathType"] == "Exact":
        return bool(path["path"] == route)
    prefix = path["path"].rstrip("/")
    return route == prefix or route.startswith(f"{prefix}/")


def _is_published(ingress: Manifest, route: str) -> bool:
    return any(is_path_match(path, route) for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"])


def _has_allow_list(ingress: Manifest) -> bool:
    annotations = ingress["metadata"].get("annotations", {})
    return any(annotations.get(name, "").strip() for name in _ALLOW_LIST_ANNOTATIONS)
