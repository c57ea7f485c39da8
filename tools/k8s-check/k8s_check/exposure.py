"""Which routes of the gateway the Ingresses publish."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s_check.manifests import Manifest, of_kind, title

ADMIN = "/v1/admin/status"
"""A route of the admin API, for all of them."""
INTERNAL = ("/metrics", "/healthz", "/readyz")

_ALLOW_LISTS = (
    "nginx.ingress.kubernetes.io/whitelist-source-range",
    "nginx.ingress.kubernetes.io/allowlist-source-range",
)


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    ingresses = list(of_kind(manifests, "Ingress"))
    for ingress in ingresses:
        yield from (
            f"{title(ingress)}: {route} must stay inside the cluster"
            for route in INTERNAL
            if _publishes(ingress, route)
        )
    restricted = [ingress for ingress in ingresses if _has_allow_list(ingress)]
    for ingress in ingresses:
        if restricted and ingress not in restricted and _publishes(ingress, ADMIN):
            yield f"{title(ingress)}: publishes the admin API without the allow-list of {title(restricted[0])}"


def covers(path: Mapping[str, Any], route: str) -> bool:
    """Return whether a path of an Ingress matches the route, as Kubernetes defines it for `Exact` and `Prefix`."""
    if path["pathType"] == "Exact":
        return bool(path["path"] == route)
    prefix = path["path"].rstrip("/")
    return route == prefix or route.startswith(f"{prefix}/")


def _publishes(ingress: Manifest, route: str) -> bool:
    return any(covers(path, route) for rule in ingress["spec"]["rules"] for path in rule["http"]["paths"])


def _has_allow_list(ingress: Manifest) -> bool:
    annotations = ingress["metadata"].get("annotations", {})
    return any(annotations.get(name, "").strip() for name in _ALLOW_LISTS)
