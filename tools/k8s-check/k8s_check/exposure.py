"""Exposure: routes of the gateway that Ingresses and HTTPRoutes publish, but must not."""

from collections.abc import Iterator, Sequence

from k8s_check.manifests import Manifest, format_title, select_kind
from k8s_check.published_routes import list_published_routes

ADMIN_PATH = "/v1/admin/status"
"""Example of a route of the admin API. The checks use it for the whole admin API."""
TRACK_PATH = "/v1/allocate"
"""Example of a track route."""
INTERNAL_PATHS = ("/metrics", "/healthz", "/readyz")

_ALLOW_LIST_ANNOTATIONS = (
    "nginx.ingress.kubernetes.io/whitelist-source-range",
    "nginx.ingress.kubernetes.io/allowlist-source-range",
)


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    routes = list_published_routes(manifests)
    for route in routes:
        yield from (
            f"{route.title}: {path} must stay inside the cluster" for path in INTERNAL_PATHS if route.is_match(path)
        )
    publishers = {route.title for route in routes if route.is_match(ADMIN_PATH)}
    yield from _check_ingresses(list(select_kind(manifests, "Ingress")), publishers)
    track_publishers = {route.title for route in routes if route.is_match(TRACK_PATH)}
    yield from _check_http_routes(list(select_kind(manifests, "HTTPRoute")), publishers, track_publishers)


def _check_ingresses(ingresses: Sequence[Manifest], publishers: set[str]) -> Iterator[str]:
    restricted = [format_title(ingress) for ingress in ingresses if _has_allow_list(ingress)]
    for title in map(format_title, ingresses):
        if restricted and title not in restricted and title in publishers:
            yield f"{title}: publishes the admin API without the allow-list of {restricted[0]}"


def _has_allow_list(ingress: Manifest) -> bool:
    annotations = ingress["metadata"].get("annotations", {})
    return any(annotations.get(name, "").strip() for name in _ALLOW_LIST_ANNOTATIONS)


def _check_http_routes(
    http_routes: Sequence[Manifest], publishers: set[str], track_publishers: set[str]
) -> Iterator[str]:
    """An HTTPRoute has no allow-list of addresses, so the admin API needs a Gateway of its own."""
    for route in http_routes:
        if any("sectionName" not in parent for parent in route["spec"]["parentRefs"]):
            yield f"{format_title(route)}: set sectionName to the listener with TLS, or port 80 serves it, too"
    track_gateways = {
        gateway
        for route in http_routes
        if format_title(route) in track_publishers - publishers
        for gateway in _list_gateways(route)
    }
    for route in http_routes:
        title = format_title(route)
        for gateway in sorted(_list_gateways(route) & track_gateways):
            if title in publishers:
                yield f"{title}: publishes the admin API on the Gateway of the track routes, {gateway}"
    titles = [format_title(route) for route in http_routes if format_title(route) in publishers]
    for title in titles[1:]:
        yield f"{title}: publishes the admin API, and so does {titles[0]}: publish it once"


def _list_gateways(route: Manifest) -> set[str]:
    return {f"{parent.get('namespace', '')}/{parent['name']}".lstrip("/") for parent in route["spec"]["parentRefs"]}
