"""References between manifests: every object and port they refer to must exist."""

from collections.abc import Iterator, Sequence

from k8s_check.manifests import (
    Manifest,
    PodTemplate,
    find_manifest,
    format_title,
    is_selector_match,
    list_operator_pods,
    list_pod_templates,
    select_kind,
)
from k8s_check.published_routes import PublishedRoute, list_published_routes


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    pods = list_pod_templates(manifests)
    yield from (
        f"{format_title(secret)}: manifests must not contain secrets, only refer to them"
        for secret in select_kind(manifests, "Secret")
    )
    for pod in pods:
        yield from _check_pod(manifests, pod)
    for service in select_kind(manifests, "Service"):
        yield from _check_service(service, pods)
    all_labels = [pod.labels for pod in pods] + [pods.labels for pods in list_operator_pods(manifests)]
    for budget in select_kind(manifests, "PodDisruptionBudget"):
        if not any(is_selector_match(budget["spec"]["selector"], labels) for labels in all_labels):
            yield f"{format_title(budget)}: selects no pods"
    for route in list_published_routes(manifests):
        yield from _check_route(manifests, route)
    yield from _check_autoscalers(manifests)


def _check_pod(manifests: Sequence[Manifest], pod: PodTemplate) -> Iterator[str]:
    account = pod.spec.get("serviceAccountName")
    if account is not None and find_manifest(manifests, "ServiceAccount", account) is None:
        yield f"{pod.title}: ServiceAccount {account} does not exist"
    for spread in pod.spec.get("topologySpreadConstraints", []):
        if not is_selector_match(spread.get("labelSelector"), pod.labels):
            yield f"{pod.title}: the spread over {spread['topologyKey']} does not select its labels"
    declared = {volume["name"] for volume in pod.spec.get("volumes", [])}
    claims = (
        (find_manifest(manifests, "StatefulSet", pod.name) or {}).get("spec", {}).get("volumeClaimTemplates", [])
    )
    declared |= {claim["metadata"]["name"] for claim in claims}
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in declared:
                yield f"{pod.title}, container {container['name']}: volume {mount['name']} is not declared"


def _check_service(service: Manifest, pods: Sequence[PodTemplate]) -> Iterator[str]:
    selected = [pod for pod in pods if is_selector_match({"matchLabels": service["spec"]["selector"]}, pod.labels)]
    if not selected:
        yield f"{format_title(service)}: selects no pods"
    for port in service["spec"]["ports"]:
        target = port.get("targetPort", port["port"])
        for pod in selected:
            if resolve_port(pod, target) is None:
                yield f"{format_title(service)}: {pod.title} has no port {target}"


def resolve_port(pod: PodTemplate, target: int | str) -> int | None:
    """Return the number of a declared port, given its name or number."""
    for container in pod.containers:
        for port in container.get("ports", []):
            if target in (port.get("name"), port["containerPort"]):
                return int(port["containerPort"])
    return None


def resolve_backend_ports(manifests: Sequence[Manifest], route: PublishedRoute) -> set[int]:
    """Return the container ports behind a published route."""
    service = find_manifest(manifests, "Service", route.service)
    if service is None:
        return set()
    return {
        number
        for port in service["spec"]["ports"]
        if route.port in (port.get("name"), port["port"])
        for pod in list_pod_templates(manifests)
        if is_selector_match({"matchLabels": service["spec"]["selector"]}, pod.labels)
        if (number := resolve_port(pod, port.get("targetPort", port["port"]))) is not None
    }


def _check_route(manifests: Sequence[Manifest], route: PublishedRoute) -> Iterator[str]:
    service = find_manifest(manifests, "Service", route.service)
    if service is None:
        yield f"{route.title}: Service {route.service} does not exist"
    elif not any(route.port in (port.get("name"), port["port"]) for port in service["spec"]["ports"]):
        yield f"{route.title}: Service {route.service} has no port {route.port}"


def _check_autoscalers(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Allow one autoscaler per Deployment, and forbid `replicas` in a Deployment with one."""
    scaled: list[str] = []
    for autoscaler in [*select_kind(manifests, "HorizontalPodAutoscaler"), *select_kind(manifests, "ScaledObject")]:
        name = autoscaler["spec"]["scaleTargetRef"]["name"]
        deployment = find_manifest(manifests, "Deployment", name)
        if deployment is None:
            yield f"{format_title(autoscaler)}: Deployment {name} does not exist"
        elif "replicas" in deployment["spec"]:
            yield f"{format_title(autoscaler)}: Deployment {name} sets replicas, so each apply undoes scaling"
        if name in scaled:
            yield f"{format_title(autoscaler)}: Deployment {name} has another autoscaler"
        scaled.append(name)
