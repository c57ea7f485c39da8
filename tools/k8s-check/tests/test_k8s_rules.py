"""Rules of the checks. Each test breaks one rule in a manifest of the production overlay."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr

from k8s_check import (
    availability,
    containers,
    monitoring,
    network_policies,
    pod_security,
    programs,
    rabbitmq_users,
    references,
    schemas,
)
from k8s_check.main import ROOT
from k8s_check.manifests import build_overlay

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="session")
def production() -> list[Any]:
    return list(build_overlay(ROOT / "deploy" / "k8s" / "overlays" / "prod"))


@pytest.fixture
def manifests(production: list[Any]) -> list[Any]:
    return copy.deepcopy(production)


def find_manifest(manifests: list[Any], kind: str, name: str) -> dict[str, Any]:
    return next(
        manifest for manifest in manifests if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)
    )


def find_container(manifests: list[Any], deployment: str) -> dict[str, Any]:
    container: dict[str, Any] = find_pod_spec(manifests, deployment)["containers"][0]
    return container


def find_pod_spec(manifests: list[Any], deployment: str) -> dict[str, Any]:
    spec: dict[str, Any] = find_manifest(manifests, "Deployment", deployment)["spec"]["template"]["spec"]
    return spec


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda pod: pod.update(hostNetwork=True), "hostNetwork is not allowed"),
        (lambda pod: pod.pop("automountServiceAccountToken"), "automountServiceAccountToken to false"),
        (lambda pod: pod.pop("enableServiceLinks"), "enableServiceLinks to false"),
        (lambda pod: pod["securityContext"].pop("runAsNonRoot"), "runAsNonRoot to true"),
        (lambda pod: pod["securityContext"].update(runAsUser=0), "not run as root"),
        (lambda pod: pod["securityContext"].pop("seccompProfile"), "seccomp profile RuntimeDefault"),
        (lambda pod: pod.update(volumes=[{"name": "x", "hostPath": {"path": "/"}}]), "hostPath is not allowed"),
    ],
)
def test_pod_outside_the_restricted_profile_is_reported(manifests: list[Any], change: Change, message: str) -> None:
    change(find_pod_spec(manifests, "reaper"))

    assert any(message in problem and "reaper" in problem for problem in pod_security.find_problems(manifests))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: own["securityContext"].update(privileged=True), "privileged is not allowed"),
        (lambda own: own["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation to false"),
        (lambda own: own["securityContext"].pop("readOnlyRootFilesystem"), "readOnlyRootFilesystem to true"),
        (lambda own: own["securityContext"].pop("capabilities"), "drop ALL capabilities"),
        (lambda own: own["securityContext"]["capabilities"].update(add=["NET_RAW"]), "not add capabilities"),
        (lambda own: own["securityContext"].update(runAsNonRoot=False), "runAsNonRoot to true"),
        (lambda own: own["ports"][0].update(hostPort=80), "not use hostPort"),
        (lambda own: own["resources"].pop("limits"), "limit memory"),
    ],
)
def test_container_outside_the_restricted_profile_is_reported(
    manifests: list[Any], change: Change, message: str
) -> None:
    change(find_container(manifests, "reaper"))

    assert any(message in problem for problem in pod_security.find_problems(manifests))


def test_unknown_field_is_reported_for_each_kubernetes_version(manifests: list[Any]) -> None:
    find_container(manifests, "reaper")["comand"] = ["true"]

    problems = list(schemas.find_problems(manifests))

    assert [
        version
        for version in schemas.VERSIONS
        if any(f"Kubernetes {version} rejects" in problem for problem in problems)
    ]
    assert len(problems) == len(schemas.VERSIONS)


def test_unknown_kind_is_reported(manifests: list[Any]) -> None:
    find_manifest(manifests, "PodDisruptionBudget", "reaper")["apiVersion"] = "policy/v1beta1"

    assert any("has no policy/v1beta1" in problem for problem in schemas.find_problems(manifests))


def test_secret_in_a_manifest_is_reported(manifests: list[Any]) -> None:
    manifests.append({"kind": "Secret", "metadata": {"name": "gateway"}})

    assert any("must not contain secrets" in problem for problem in references.find_problems(manifests))


def test_plain_text_token_is_reported(manifests: list[Any]) -> None:
    for entry in find_container(manifests, "reaper")["env"]:
        if entry["name"] == "CSP_API_TOKEN":
            entry.pop("valueFrom")
            entry["value"] = "token"

    assert any(
        "CSP_API_TOKEN must come from a secret" in problem for problem in containers.find_problems(manifests)
    )


def test_invalid_setting_is_reported(manifests: list[Any]) -> None:
    find_container(manifests, "reaper")["env"].append({"name": "CLEANUP_CONCURRENCY", "value": "many"})

    assert any("CLEANUP_CONCURRENCY: Input should be" in problem for problem in containers.find_problems(manifests))


@pytest.mark.parametrize(
    ("kind", "probe", "message"),
    [
        ("livenessProbe", {"httpGet": {"path": "/readyz", "port": "ops"}}, "use /healthz"),
        ("livenessProbe", {"httpGet": {"path": "/healthz", "port": "web"}}, "port web is not declared"),
        ("livenessProbe", {"exec": {"command": ["true"]}}, "has no livenessProbe over HTTP"),
        ("readinessProbe", {"httpGet": {"path": "/healthz", "port": "ops"}}, "use /readyz"),
        ("readinessProbe", {"httpGet": {"path": "/readyz", "port": "ops"}}, "may take 2 s"),
    ],
)
def test_useless_probe_is_reported(manifests: list[Any], kind: str, probe: dict[str, Any], message: str) -> None:
    find_container(manifests, "allocator")[kind] = probe

    assert any(message in problem for problem in containers.find_problems(manifests))


def test_too_short_grace_period_is_reported(manifests: list[Any]) -> None:
    find_pod_spec(manifests, "gateway").pop("terminationGracePeriodSeconds")

    assert any(
        "gateway: terminationGracePeriodSeconds is 30" in problem for problem in containers.find_problems(manifests)
    )


def test_unknown_module_is_reported(manifests: list[Any]) -> None:
    job = find_manifest(manifests, "Job", "migration")["spec"]["template"]["spec"]["containers"][0]
    job["command"] = ["python", "-m", "sandbox_broker.migration"]

    assert any(
        "sandbox_broker.migration is not one of" in problem for problem in containers.find_problems(manifests)
    )


def test_ingress_path_without_a_route_is_reported(manifests: list[Any]) -> None:
    path = find_manifest(manifests, "Ingress", "gateway")["spec"]["rules"][0]["http"]["paths"][0]
    path["path"] = "/v2"

    problems = list(containers.find_problems(manifests))

    assert any("gateway serves no path for /v2 (prefix)" in problem for problem in problems)


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        ("Service", "reaper", lambda manifest: manifest["spec"]["selector"].update(a="b"), "no pods"),
        (
            "Service",
            "reaper",
            lambda manifest: manifest["spec"]["ports"][0].update(targetPort=9999),
            "has no port 9999",
        ),
        (
            "PodDisruptionBudget",
            "reaper",
            lambda manifest: manifest["spec"]["selector"].update(matchLabels={"a": "b"}),
            "no pods",
        ),
        (
            "ServiceAccount",
            "reaper",
            lambda manifest: manifest["metadata"].update(name="x"),
            "ServiceAccount reaper does not exist",
        ),
        (
            "ScaledObject",
            "gateway",
            lambda manifest: manifest["spec"]["scaleTargetRef"].update(name="x"),
            "Deployment x does not exist",
        ),
        ("Deployment", "gateway", lambda manifest: manifest["spec"].update(replicas=2), "sets replicas"),
    ],
)
def test_broken_reference_is_reported(
    manifests: list[Any], kind: str, name: str, change: Change, message: str
) -> None:
    change(find_manifest(manifests, kind, name))

    assert any(message in problem for problem in references.find_problems(manifests))


@pytest.mark.parametrize(
    ("kind", "name", "change", "message"),
    [
        (
            "PodDisruptionBudget",
            "rabbitmq",
            lambda manifest: manifest["spec"].update(maxUnavailable=2),
            "RabbitmqCluster rabbitmq: needs one PodDisruptionBudget with maxUnavailable 1",
        ),
        (
            "PodDisruptionBudget",
            "gateway",
            lambda manifest: manifest["spec"]["selector"].update(matchLabels={"a": "b"}),
            "Deployment gateway: needs one PodDisruptionBudget",
        ),
        (
            "Deployment",
            "allocator",
            lambda manifest: manifest["spec"]["strategy"]["rollingUpdate"].update(maxUnavailable=1),
            "Deployment allocator: set maxUnavailable to 0",
        ),
        (
            "Deployment",
            "gateway",
            lambda manifest: manifest["spec"]["template"]["spec"].pop("priorityClassName"),
            "Deployment gateway: needs a priorityClassName of these manifests, and has none",
        ),
        (
            "Cluster",
            "postgres",
            lambda manifest: manifest["spec"].update(priorityClassName="high"),
            "Cluster postgres: needs a priorityClassName of these manifests, and has high",
        ),
        (
            "RabbitmqCluster",
            "rabbitmq",
            lambda manifest: manifest["spec"].pop("override"),
            "RabbitmqCluster rabbitmq: needs a priorityClassName",
        ),
        (
            "PriorityClass",
            "sandbox-broker-background",
            lambda manifest: manifest.update(value=100000),
            "Deployment csp-syncer: needs a lower priority",
        ),
        (
            "Job",
            "migration",
            lambda manifest: manifest["spec"].update(ttlSecondsAfterFinished=300),
            "Job migration: remove ttlSecondsAfterFinished",
        ),
        (
            "Job",
            "migration",
            lambda manifest: manifest["metadata"].pop("annotations"),
            "Job migration: set the annotation kustomize.toolkit.fluxcd.io/force: enabled",
        ),
        (
            "Job",
            "migration",
            lambda manifest: manifest["metadata"]["annotations"].update(
                {"argocd.argoproj.io/sync-options": "Replace=true"}
            ),
            "Job migration: set the annotation argocd.argoproj.io/sync-options: Force=true,Replace=true",
        ),
        (
            "RabbitmqCluster",
            "rabbitmq",
            lambda manifest: manifest["spec"].update(replicas=2),
            "RabbitmqCluster rabbitmq: set replicas to 3 or 5",
        ),
        (
            "RabbitmqCluster",
            "rabbitmq",
            lambda manifest: manifest["spec"]["rabbitmq"].update(
                additionalConfig="cluster_partition_handling = ignore"
            ),
            "RabbitmqCluster rabbitmq: set cluster_partition_handling to pause_minority",
        ),
        (
            "RabbitmqCluster",
            "rabbitmq",
            lambda manifest: manifest["spec"].update(terminationGracePeriodSeconds=60),
            "RabbitmqCluster rabbitmq: remove terminationGracePeriodSeconds",
        ),
        (
            "RabbitmqCluster",
            "rabbitmq",
            lambda manifest: manifest["spec"].pop("affinity"),
            "RabbitmqCluster rabbitmq: needs a required anti-affinity",
        ),
        (
            "RabbitmqCluster",
            "rabbitmq",
            lambda manifest: manifest["spec"]["override"]["statefulSet"]["spec"]["template"]["spec"].update(
                containers=[{"name": "rabbitmq", "securityContext": {}}]
            ),
            "RabbitmqCluster rabbitmq: must not override securityContext",
        ),
        (
            "Cluster",
            "postgres",
            lambda manifest: manifest["spec"].update(instances=2),
            "Cluster postgres: set instances to 3 or more",
        ),
        (
            "Cluster",
            "postgres",
            lambda manifest: manifest["spec"]["postgresql"].pop("synchronous"),
            "Cluster postgres: needs a synchronous standby",
        ),
        (
            "Cluster",
            "postgres",
            lambda manifest: manifest["spec"]["postgresql"]["synchronous"].update(dataDurability="preferred"),
            "Cluster postgres: needs a synchronous standby",
        ),
        (
            "Cluster",
            "postgres",
            lambda manifest: manifest["spec"]["postgresql"]["synchronous"].pop("failoverQuorum"),
            "Cluster postgres: set failoverQuorum to true",
        ),
        (
            "Cluster",
            "postgres",
            lambda manifest: manifest["spec"].update(enablePDB=False),
            "Cluster postgres: must not disable its PodDisruptionBudgets",
        ),
        (
            "Cluster",
            "postgres",
            lambda manifest: manifest["spec"]["affinity"].update(podAntiAffinityType="preferred"),
            "Cluster postgres: set podAntiAffinityType to required",
        ),
    ],
)
def test_risk_for_availability_is_reported(
    manifests: list[Any], kind: str, name: str, change: Change, message: str
) -> None:
    assert list(availability.find_problems(manifests)) == []
    change(find_manifest(manifests, kind, name))

    assert any(problem.startswith(message) for problem in availability.find_problems(manifests))


@pytest.mark.parametrize(
    ("name", "message"),
    [("rabbitmq", "RabbitmqCluster rabbitmq: no PodMonitor"), ("postgres", "Cluster postgres: no PodMonitor")],
)
def test_server_without_a_monitor_is_reported(manifests: list[Any], name: str, message: str) -> None:
    find_manifest(manifests, "PodMonitor", name)["spec"]["selector"]["matchLabels"] = {"a": "b"}

    assert any(problem.startswith(message) for problem in monitoring.find_problems(manifests, ROOT / "deploy"))


def add_policy_rule(manifests: list[Any], policy: str, direction: str, rule: dict[str, Any]) -> None:
    find_manifest(manifests, "NetworkPolicy", policy)["spec"].setdefault(direction, []).append(rule)


def test_allowed_connection_without_a_setting_is_reported(manifests: list[Any]) -> None:
    postgres = {"podSelector": {"matchLabels": {"sandbox-broker/server": "postgres"}}}
    add_policy_rule(manifests, "reaper", "egress", {"to": [postgres], "ports": [{"port": 5432}]})
    reaper = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "reaper"}}}
    add_policy_rule(manifests, "postgres", "ingress", {"from": [reaper], "ports": [{"port": 5432}]})

    assert list(network_policies.find_problems(manifests)) == [
        "NetworkPolicy: reaper to PostgreSQL, port 5432 is allowed, but the code does not need it"
    ]


def test_ingress_from_everywhere_is_reported(manifests: list[Any]) -> None:
    add_policy_rule(manifests, "allocator", "ingress", {"ports": [{"port": 9101}]})

    problems = list(network_policies.find_problems(manifests))

    assert any("a pod of another namespace to allocator, port 9101" in problem for problem in problems)


def test_csp_rule_must_exclude_the_private_network(manifests: list[Any]) -> None:
    policy = find_manifest(manifests, "NetworkPolicy", "csp-syncer")["spec"]
    for rule in policy["egress"]:
        for peer in rule["to"]:
            peer.get("ipBlock", {}).pop("except", None)

    problems = list(network_policies.find_problems(manifests))

    assert problems == [
        f"NetworkPolicy: csp-syncer to {target}, port 443 is allowed, but the code does not need it"
        for target in (
            "NodeLocal DNSCache",
            "an address of the private network",
            "the metadata service of the cloud",
        )
    ]


def test_pods_without_a_policy_are_open_if_default_deny_is_missing(manifests: list[Any]) -> None:
    removed = {"default-deny", "dns", "postgres"}
    remaining = [
        manifest
        for manifest in manifests
        if not (manifest["kind"] == "NetworkPolicy" and manifest["metadata"]["name"] in removed)
    ]

    assert any(
        "a pod of another namespace to PostgreSQL" in problem
        for problem in network_policies.find_problems(remaining)
    )


@pytest.mark.parametrize(
    ("peer", "message"),
    [
        ("kube-dns", "reaper to DNS, port 53 is needed"),
        ("node-local-dns", "reaper to NodeLocal DNSCache as a pod, port 53 is needed"),
        ("169.254.20.10/32", "reaper to NodeLocal DNSCache, port 53 is needed"),
        ("openshift-dns", "reaper to DNS of OpenShift, port 5353 is needed"),
        ("2000::/3", "reaper to CSP over IPv6, port 443 is needed"),
        ("64:ff9b::/96", "reaper to CSP over NAT64, port 443 is needed"),
    ],
)
def test_missing_peer_of_dns_or_csp_is_reported(manifests: list[Any], peer: str, message: str) -> None:
    for policy in ("dns", "reaper"):
        for rule in find_manifest(manifests, "NetworkPolicy", policy)["spec"]["egress"]:
            rule["to"] = [entry for entry in rule["to"] if f"'{peer}'" not in str(entry)] or [
                {"ipBlock": {"cidr": "192.0.2.1/32"}}
            ]

    assert any(message in problem for problem in network_policies.find_problems(manifests))


def test_private_ipv6_address_and_metadata_service_are_closed(manifests: list[Any]) -> None:
    policy = find_manifest(manifests, "NetworkPolicy", "reaper")["spec"]
    policy["egress"].append({"to": [{"ipBlock": {"cidr": "::/0"}}], "ports": [{"port": 443}]})
    policy["egress"].append({"to": [{"ipBlock": {"cidr": "169.254.169.254/32"}}], "ports": [{"port": 80}]})

    assert list(network_policies.find_problems(manifests)) == [
        "NetworkPolicy: reaper to a private IPv6 address, port 443 is allowed, but the code does not need it",
        "NetworkPolicy: reaper to the metadata service of the cloud, port 80 is allowed, but the code does not "
        "need it",
    ]


@pytest.mark.parametrize("policy", ["gateway", "rabbitmq", "dns"])
def test_connection_must_be_allowed_at_both_ends(manifests: list[Any], policy: str) -> None:
    spec = find_manifest(manifests, "NetworkPolicy", policy)["spec"]
    spec["ingress"], spec["egress"] = [], []

    assert any(
        "gateway to " in problem and "is needed" in problem for problem in network_policies.find_problems(manifests)
    )


def test_users_and_policies_that_differ_from_the_definitions_are_reported(manifests: list[Any]) -> None:
    find_manifest(manifests, "Permission", "gateway")["spec"]["permissions"]["write"] = ".*"
    find_manifest(manifests, "Policy", "events")["spec"]["definition"]["max-length"] = 1
    manifests.append({"kind": "User", "metadata": {"name": "guest"}})

    problems = list(rabbitmq_users.find_problems(manifests, ROOT / "deploy"))

    assert [problem.split(":")[0] for problem in problems] == ["Permission gateway", "User guest", "Policy events"]


def test_secret_settings_are_those_with_a_secret_type() -> None:
    all_programs = [*programs.SERVICES.values(), *programs.COMMANDS.values()]
    by_type = {
        name
        for program in all_programs
        for name, field in program.settings.model_fields.items()
        if field.annotation is SecretStr or not field.repr
    }

    assert by_type == programs.SECRET_SETTINGS
