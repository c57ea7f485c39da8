"""Each rule, by one manifest of the production overlay that breaks it."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import SecretStr

from k8s_check import network, references, restricted, schemas, services, users, wiring
from k8s_check.main import ROOT
from k8s_check.manifests import build

Change = Callable[[dict[str, Any]], object]


@pytest.fixture(scope="session")
def production() -> list[Any]:
    return list(build(ROOT / "deploy" / "k8s" / "overlays" / "prod"))


@pytest.fixture
def manifests(production: list[Any]) -> list[Any]:
    return copy.deepcopy(production)


def find(manifests: list[Any], kind: str, name: str) -> dict[str, Any]:
    return next(found for found in manifests if (found["kind"], found["metadata"]["name"]) == (kind, name))


def container(manifests: list[Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = pod(manifests, name)["containers"][0]
    return found


def pod(manifests: list[Any], name: str) -> dict[str, Any]:
    found: dict[str, Any] = find(manifests, "Deployment", name)["spec"]["template"]["spec"]
    return found


@pytest.mark.parametrize(
    ("change", "told"),
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
def test_a_pod_outside_the_restricted_profile_is_told(manifests: list[Any], change: Change, told: str) -> None:
    change(pod(manifests, "reaper"))

    assert any(told in problem and "reaper" in problem for problem in restricted.problems(manifests))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda own: own["securityContext"].update(privileged=True), "privileged is not allowed"),
        (lambda own: own["securityContext"].pop("allowPrivilegeEscalation"), "allowPrivilegeEscalation to false"),
        (lambda own: own["securityContext"].pop("readOnlyRootFilesystem"), "readOnlyRootFilesystem to true"),
        (lambda own: own["securityContext"].pop("capabilities"), "drop ALL capabilities"),
        (lambda own: own["securityContext"]["capabilities"].update(add=["NET_RAW"]), "add no capability"),
        (lambda own: own["securityContext"].update(runAsNonRoot=False), "runAsNonRoot to true"),
        (lambda own: own["ports"][0].update(hostPort=80), "no port of the host"),
        (lambda own: own["resources"].pop("limits"), "limit memory"),
    ],
)
def test_a_container_outside_the_restricted_profile_is_told(
    manifests: list[Any], change: Change, told: str
) -> None:
    change(container(manifests, "reaper"))

    assert any(told in problem for problem in restricted.problems(manifests))


def test_a_field_that_kubernetes_does_not_know_is_told_for_each_version(manifests: list[Any]) -> None:
    container(manifests, "reaper")["comand"] = ["true"]

    found = list(schemas.problems(manifests))

    assert [version for version in schemas.VERSIONS if any(f"Kubernetes {version} refuses" in one for one in found)]
    assert len(found) == len(schemas.VERSIONS)


def test_a_kind_that_kubernetes_does_not_know_is_told(manifests: list[Any]) -> None:
    find(manifests, "PodDisruptionBudget", "reaper")["apiVersion"] = "policy/v1beta1"

    assert any("has no policy/v1beta1" in problem for problem in schemas.problems(manifests))


def test_a_secret_in_a_manifest_is_told(manifests: list[Any]) -> None:
    manifests.append({"kind": "Secret", "metadata": {"name": "gateway"}})

    assert any("only referred to" in problem for problem in references.problems(manifests))


def test_a_password_that_is_written_out_is_told(manifests: list[Any]) -> None:
    for entry in container(manifests, "reaper")["env"]:
        if entry["name"] == "CSP_API_TOKEN":
            entry.pop("valueFrom")
            entry["value"] = "token"

    assert any("CSP_API_TOKEN must come from a secret" in problem for problem in wiring.problems(manifests))


def test_a_value_that_the_service_would_refuse_is_told(manifests: list[Any]) -> None:
    container(manifests, "reaper")["env"].append({"name": "CLEANUP_CONCURRENCY", "value": "many"})

    assert any("CLEANUP_CONCURRENCY: Input should be" in problem for problem in wiring.problems(manifests))


@pytest.mark.parametrize(
    ("kind", "probe", "told"),
    [
        ("livenessProbe", {"httpGet": {"path": "/readyz", "port": "ops"}}, "use /healthz"),
        ("livenessProbe", {"httpGet": {"path": "/healthz", "port": "web"}}, "port web is not declared"),
        ("livenessProbe", {"exec": {"command": ["true"]}}, "has no livenessProbe over HTTP"),
        ("readinessProbe", {"httpGet": {"path": "/healthz", "port": "ops"}}, "/readyz is what says"),
        ("readinessProbe", {"httpGet": {"path": "/readyz", "port": "ops"}}, "takes up to 2 s"),
    ],
)
def test_a_probe_that_means_nothing_is_told(
    manifests: list[Any], kind: str, probe: dict[str, Any], told: str
) -> None:
    container(manifests, "allocator")[kind] = probe

    assert any(told in problem for problem in wiring.problems(manifests))


def test_a_pod_that_may_be_killed_before_it_has_stopped_is_told(manifests: list[Any]) -> None:
    pod(manifests, "gateway").pop("terminationGracePeriodSeconds")

    assert any("gateway: has 30 s to stop" in problem for problem in wiring.problems(manifests))


def test_a_module_that_does_not_exist_is_told(manifests: list[Any]) -> None:
    job = find(manifests, "Job", "migration")["spec"]["template"]["spec"]["containers"][0]
    job["command"] = ["python", "-m", "sandbox_broker.migration"]

    assert any("sandbox_broker.migration is none of" in problem for problem in wiring.problems(manifests))


def test_an_entrance_to_nothing_is_told(manifests: list[Any]) -> None:
    path = find(manifests, "Ingress", "gateway")["spec"]["rules"][0]["http"]["paths"][0]
    path["path"] = "/v2"

    assert any("/v2 (Prefix) is not served by gateway" in problem for problem in wiring.problems(manifests))


@pytest.mark.parametrize(
    ("kind", "name", "change", "told"),
    [
        ("Service", "reaper", lambda it: it["spec"]["selector"].update(a="b"), "no pods"),
        ("Service", "reaper", lambda it: it["spec"]["ports"][0].update(targetPort=9999), "has no port 9999"),
        (
            "PodDisruptionBudget",
            "reaper",
            lambda it: it["spec"]["selector"].update(matchLabels={"a": "b"}),
            "no pods",
        ),
        ("ServiceAccount", "reaper", lambda it: it["metadata"].update(name="x"), "no ServiceAccount reaper"),
        ("ScaledObject", "gateway", lambda it: it["spec"]["scaleTargetRef"].update(name="x"), "no Deployment x"),
        ("Deployment", "gateway", lambda it: it["spec"].update(replicas=2), "sets replicas"),
    ],
)
def test_a_manifest_that_refers_to_what_is_not_there_is_told(
    manifests: list[Any], kind: str, name: str, change: Change, told: str
) -> None:
    change(find(manifests, kind, name))

    assert any(told in problem for problem in references.problems(manifests))


def allow(manifests: list[Any], policy: str, direction: str, rule: dict[str, Any]) -> None:
    find(manifests, "NetworkPolicy", policy)["spec"].setdefault(direction, []).append(rule)


def test_a_way_out_that_no_setting_asks_for_is_told(manifests: list[Any]) -> None:
    postgres = {"podSelector": {"matchLabels": {"sandbox-broker/server": "postgres"}}}
    allow(manifests, "reaper", "egress", {"to": [postgres], "ports": [{"port": 5432}]})
    reaper = {"podSelector": {"matchLabels": {"app.kubernetes.io/name": "reaper"}}}
    allow(manifests, "postgres", "ingress", {"from": [reaper], "ports": [{"port": 5432}]})

    assert list(network.problems(manifests)) == [
        "NetworkPolicy: reaper to PostgreSQL, port 5432 is let through, and nothing in the code needs it"
    ]


def test_a_way_in_from_everywhere_is_told(manifests: list[Any]) -> None:
    allow(manifests, "allocator", "ingress", {"ports": [{"port": 9101}]})

    found = list(network.problems(manifests))

    assert any("a pod of another namespace to allocator, port 9101" in problem for problem in found)


def test_the_private_network_is_no_part_of_csp(manifests: list[Any]) -> None:
    policy = find(manifests, "NetworkPolicy", "csp-syncer")["spec"]
    for rule in policy["egress"]:
        for peer in rule["to"]:
            peer.get("ipBlock", {}).pop("except", None)

    found = list(network.problems(manifests))

    assert found == [
        "NetworkPolicy: csp-syncer to an address of the private network, port 443 is let through, and nothing in "
        "the code needs it"
    ]


def test_without_the_policy_that_denies_the_rest_pods_of_no_policy_are_open(manifests: list[Any]) -> None:
    gone = {"default-deny", "dns", "postgres"}
    left = [one for one in manifests if not (one["kind"] == "NetworkPolicy" and one["metadata"]["name"] in gone)]

    assert any("a pod of another namespace to PostgreSQL" in problem for problem in network.problems(left))


@pytest.mark.parametrize("one_end", ["gateway", "rabbitmq", "dns"])
def test_a_connection_must_be_let_through_at_both_its_ends(manifests: list[Any], one_end: str) -> None:
    spec = find(manifests, "NetworkPolicy", one_end)["spec"]
    spec["ingress"], spec["egress"] = [], []

    assert any("gateway to " in problem and "is needed" in problem for problem in network.problems(manifests))


def test_users_that_differ_from_the_definitions_are_told(manifests: list[Any]) -> None:
    find(manifests, "Permission", "gateway")["spec"]["permissions"]["write"] = ".*"
    find(manifests, "Policy", "events")["spec"]["definition"]["max-length"] = 1
    manifests.append({"kind": "User", "metadata": {"name": "guest"}})

    found = list(users.problems(manifests, ROOT / "deploy"))

    assert [problem.split(":")[0] for problem in found] == ["Permission gateway", "User guest", "Policy events"]


def test_every_setting_that_is_secret_by_its_type_must_come_from_a_secret() -> None:
    programs = [*services.SERVICES.values(), *services.COMMANDS.values()]
    by_type = {
        name
        for program in programs
        for name, field in program.settings.model_fields.items()
        if field.annotation is SecretStr or not field.repr
    }

    assert by_type == services.SECRETS
