"""Whatever one manifest says of another: there must be such a one."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s_check.manifests import Manifest, Pods, named, of_kind, pods, selects, title


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    ours = pods(manifests)
    yield from (f"{title(secret)}: secrets are only referred to" for secret in of_kind(manifests, "Secret"))
    for pod in ours:
        yield from _pod(manifests, pod)
    for service in of_kind(manifests, "Service"):
        yield from _service(service, ours)
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        if not any(selects(budget["spec"]["selector"], pod.labels) for pod in ours):
            yield f"{title(budget)}: selects no pods"
    for ingress in of_kind(manifests, "Ingress"):
        yield from _ingress(manifests, ingress)
    yield from _scaling(manifests)


def _pod(manifests: Sequence[Manifest], pod: Pods) -> Iterator[str]:
    account = pod.spec.get("serviceAccountName")
    if account is not None and named(manifests, "ServiceAccount", account) is None:
        yield f"{pod.title}: there is no ServiceAccount {account}"
    for spread in pod.spec.get("topologySpreadConstraints", []):
        if not selects(spread.get("labelSelector"), pod.labels):
            yield f"{pod.title}: is spread over {spread['topologyKey']} by labels that it has not"
    declared = {volume["name"] for volume in pod.spec.get("volumes", [])}
    claims = (named(manifests, "StatefulSet", pod.name) or {}).get("spec", {}).get("volumeClaimTemplates", [])
    declared |= {claim["metadata"]["name"] for claim in claims}
    for container in pod.containers:
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in declared:
                yield f"{pod.title}, container {container['name']}: there is no volume {mount['name']}"


def _service(service: Manifest, ours: Sequence[Pods]) -> Iterator[str]:
    selected = [pod for pod in ours if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]
    if not selected:
        yield f"{title(service)}: selects no pods"
    for port in service["spec"]["ports"]:
        target = port.get("targetPort", port["port"])
        for pod in selected:
            if target_port(pod, target) is None:
                yield f"{title(service)}: {pod.title} has no port {target}"


def target_port(pod: Pods, target: int | str) -> int | None:
    """The number of a port that the pod has, given its name or number."""
    for container in pod.containers:
        for port in container.get("ports", []):
            if target in (port.get("name"), port["containerPort"]):
                return int(port["containerPort"])
    return None


def backend_ports(manifests: Sequence[Manifest], backend: Mapping[str, Any]) -> set[int]:
    """The container ports that a backend of an Ingress leads to."""
    service = named(manifests, "Service", backend["name"])
    if service is None:
        return set()
    wanted = set(backend["port"].values())
    return {
        number
        for port in service["spec"]["ports"]
        if wanted & {port.get("name"), port["port"]}
        for pod in pods(manifests)
        if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)
        if (number := target_port(pod, port.get("targetPort", port["port"]))) is not None
    }


def _ingress(manifests: Sequence[Manifest], ingress: Manifest) -> Iterator[str]:
    for rule in ingress["spec"]["rules"]:
        for path in rule["http"]["paths"]:
            backend: Mapping[str, Any] = path["backend"]["service"]
            service = named(manifests, "Service", backend["name"])
            if service is None:
                yield f"{title(ingress)}: there is no Service {backend['name']}"
                continue
            wanted = backend["port"].get("name") or backend["port"].get("number")
            if not any(wanted in (port.get("name"), port["port"]) for port in service["spec"]["ports"]):
                yield f"{title(ingress)}: Service {backend['name']} has no port {wanted}"


def _scaling(manifests: Sequence[Manifest]) -> Iterator[str]:
    """One autoscaler for a Deployment at most, and then the Deployment itself says no number."""
    scaled: list[str] = []
    for autoscaler in [*of_kind(manifests, "HorizontalPodAutoscaler"), *of_kind(manifests, "ScaledObject")]:
        name = autoscaler["spec"]["scaleTargetRef"]["name"]
        deployment = named(manifests, "Deployment", name)
        if deployment is None:
            yield f"{title(autoscaler)}: there is no Deployment {name}"
        elif "replicas" in deployment["spec"]:
            yield f"{title(autoscaler)}: Deployment {name} sets replicas, which each apply would put back"
        if name in scaled:
            yield f"{title(autoscaler)}: Deployment {name} has another autoscaler"
        scaled.append(name)
