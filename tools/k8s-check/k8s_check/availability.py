"""Availability: disruption budgets, rolling updates, priorities, and the clusters of PostgreSQL and RabbitMQ."""

from collections.abc import Iterator, Mapping, Sequence

from k8s_check.manifests import (
    Manifest,
    find_manifest,
    format_title,
    is_selector_match,
    list_operator_pods,
    list_pod_templates,
    override_pod_spec,
    select_kind,
)

BACKGROUND = frozenset(
    {"Deployment reaper", "Deployment csp-syncer", "Deployment provisioner", "Deployment console"}
)
"""Pods with work that can wait. All others have a higher priority."""

_GITOPS_ANNOTATIONS = {
    "argocd.argoproj.io/sync-options": "Force=true,Replace=true",
    "kustomize.toolkit.fluxcd.io/force": "enabled",
}


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    for deployment in select_kind(manifests, "Deployment"):
        labels = deployment["spec"]["template"]["metadata"]["labels"]
        yield from _check_budget(manifests, format_title(deployment), labels)
        if deployment["spec"].get("strategy", {}).get("rollingUpdate", {}).get("maxUnavailable") != 0:
            yield f"{format_title(deployment)}: set maxUnavailable to 0, or an update removes a working pod first"
    yield from _check_priorities(manifests)
    for job in select_kind(manifests, "Job"):
        yield from _check_job(job)
    for cluster in select_kind(manifests, "RabbitmqCluster"):
        yield from (f"{format_title(cluster)}: {problem}" for problem in _check_rabbitmq(cluster))
    for pods in list_operator_pods(manifests):
        if pods.title.startswith("RabbitmqCluster"):  # CloudNativePG creates its budgets
            yield from _check_budget(manifests, pods.title, pods.labels)
    for cluster in select_kind(manifests, "Cluster"):
        yield from (f"{format_title(cluster)}: {problem}" for problem in _check_postgres(cluster))


def _check_budget(manifests: Sequence[Manifest], title: str, labels: Mapping[str, str]) -> Iterator[str]:
    budgets = [
        budget["spec"]
        for budget in select_kind(manifests, "PodDisruptionBudget")
        if is_selector_match(budget["spec"]["selector"], labels)
    ]
    if [budget.get("maxUnavailable") for budget in budgets] != [1]:
        yield f"{title}: needs one PodDisruptionBudget with maxUnavailable 1"


def _check_priorities(manifests: Sequence[Manifest]) -> Iterator[str]:
    classes = {pod.title: pod.spec.get("priorityClassName") for pod in list_pod_templates(manifests)} | {
        pods.title: pods.priority_class for pods in list_operator_pods(manifests)
    }
    values: dict[str, int] = {}
    for title, name in classes.items():
        priority_class = find_manifest(manifests, "PriorityClass", name) if name else None
        if priority_class is None:
            yield f"{title}: needs a priorityClassName of these manifests, and has {name or 'none'}"
        else:
            values[title] = priority_class["value"]
    lowest = min((value for title, value in values.items() if title not in BACKGROUND), default=0)
    for title in sorted(BACKGROUND & values.keys()):
        if values[title] >= lowest:
            yield f"{title}: needs a lower priority than the pods that students wait for"


def _check_job(job: Manifest) -> Iterator[str]:
    if "ttlSecondsAfterFinished" in job["spec"]:
        yield f"{format_title(job)}: remove ttlSecondsAfterFinished, or Argo CD and Flux run the Job without end"
    annotations = job["metadata"].get("annotations", {})
    for name, value in _GITOPS_ANNOTATIONS.items():
        if annotations.get(name) != value:
            yield f"{format_title(job)}: set the annotation {name}: {value}, because a Job is immutable"


def _check_rabbitmq(cluster: Manifest) -> Iterator[str]:
    spec = cluster["spec"]
    if spec.get("replicas", 1) < 3 or spec["replicas"] % 2 == 0:
        yield "set replicas to 3 or 5, because a queue needs a majority of its nodes"
    lines = [line.replace(" ", "") for line in spec.get("rabbitmq", {}).get("additionalConfig", "").splitlines()]
    if "cluster_partition_handling=pause_minority" not in lines:
        yield "set cluster_partition_handling to pause_minority, or both sides of a partition accept messages"
    if "terminationGracePeriodSeconds" in spec:
        yield "remove terminationGracePeriodSeconds: a node stops when the others can do without it"
    terms = (
        spec.get("affinity", {})
        .get("podAntiAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution", [])
    )
    if "kubernetes.io/hostname" not in {term["topologyKey"] for term in terms}:
        yield "needs a required anti-affinity over kubernetes.io/hostname, or one machine takes two nodes down"
    pod = override_pod_spec(cluster)
    if any("securityContext" in part for part in (pod, *pod.get("initContainers", []), *pod.get("containers", []))):
        yield "must not override securityContext, because the operator sets that of the restricted profile"


def _check_postgres(cluster: Manifest) -> Iterator[str]:
    spec = cluster["spec"]
    synchronous = spec.get("postgresql", {}).get("synchronous", {})
    if spec.get("instances", 1) < 3:
        yield "set instances to 3 or more, or the failure of one standby stops allocations"
    if synchronous.get("number", 0) < 1 or synchronous.get("dataDurability", "required") != "required":
        yield "needs a synchronous standby with dataDurability required, or a fail-over loses confirmed leases"
    if synchronous.get("failoverQuorum") is not True:
        yield "set failoverQuorum to true, or a standby without the newest leases may be promoted"
    if spec.get("enablePDB") is False:
        yield "must not disable its PodDisruptionBudgets"
    if spec.get("affinity", {}).get("podAntiAffinityType") != "required":
        yield "set podAntiAffinityType to required, or one machine takes two instances down"
