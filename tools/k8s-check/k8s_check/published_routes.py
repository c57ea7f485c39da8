"""Routes that Ingresses and HTTPRoutes publish, in one form for all checks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from k8s_check.manifests import Manifest, format_title, select_kind


@dataclass(frozen=True, slots=True)
class PublishedRoute:
    """One path of an Ingress or an HTTPRoute, with the Service behind it."""

    title: str
    path: str
    is_exact: bool
    service: str
    port: int | str
    """Number or name of a port of the Service."""

    def is_match(self, path: str) -> bool:
        if self.is_exact:
            return path == self.path
        prefix = self.path.rstrip("/")
        return path == prefix or path.startswith(f"{prefix}/")

    def __str__(self) -> str:
        return f"{self.path} ({'exact' if self.is_exact else 'prefix'})"


def list_published_routes(manifests: Sequence[Manifest]) -> list[PublishedRoute]:
    return [*_list_ingress_routes(manifests), *_list_http_routes(manifests)]


def _list_ingress_routes(manifests: Sequence[Manifest]) -> Iterator[PublishedRoute]:
    for ingress in select_kind(manifests, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                backend = path["backend"]["service"]
                (port,) = backend["port"].values()
                yield PublishedRoute(
                    format_title(ingress), path["path"], path["pathType"] == "Exact", backend["name"], port
                )


def _list_http_routes(manifests: Sequence[Manifest]) -> Iterator[PublishedRoute]:
    for route in select_kind(manifests, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            # Without matches, a rule publishes every path.
            for match in rule.get("matches") or [{}]:
                path = match.get("path", {})
                for backend in rule["backendRefs"]:
                    yield PublishedRoute(
                        format_title(route),
                        path.get("value", "/"),
                        path.get("type") == "Exact",
                        backend["name"],
                        backend["port"],
                    )
