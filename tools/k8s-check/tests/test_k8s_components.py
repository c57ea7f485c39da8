"""Rules for the optional components. Each test breaks one rule in the production overlay with all of them."""

import base64
import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from k8s_check import exposure, network_policies, operators, programs, references, secret_references
from k8s_check.main import ROOT, list_optional_components
from k8s_check.manifests import build_overlay, build_with_components
from sandbox_broker.runtime.server_urls import amqp_host, split_amqp_urls

Change = Callable[[dict[str, Any]], object]

K8S = ROOT / "deploy" / "k8s"
AUTHORITIES = "/etc/sandbox-broker/authorities"
"""Folder of components/tls in the pods."""


@pytest.fixture(scope="session")
def built() -> list[Any]:
    return list(build_with_components(K8S / "overlays" / "prod", list_optional_components(K8S)))


@pytest.fixture
def manifests(built: list[Any]) -> list[Any]:
    return copy.deepcopy(built)


def find(manifests: list[Any], kind: str, name: str) -> dict[str, Any]:
    return next(
        manifest for manifest in manifests if (manifest["kind"], manifest["metadata"]["name"]) == (kind, name)
    )


def policy_ports(manifests: list[Any], name: str, direction: str) -> list[dict[str, Any]]:
    return [port for rule in find(manifests, "NetworkPolicy", name)["spec"][direction] for port in rule["ports"]]


def test_unbroken_manifests_have_no_problems(manifests: list[Any]) -> None:
    assert list(network_policies.find_problems(manifests)) == []
    assert list(secret_references.find_problems(manifests)) == []
    assert list(exposure.find_problems(manifests)) == []
    assert not any(manifest["kind"] == "Ingress" for manifest in manifests)


# Network


@pytest.mark.parametrize(
    ("policy", "direction", "port", "message"),
    [
        ("gateway", "egress", 5671, "gateway to RabbitMQ, port 5671 is needed, but not allowed"),
        ("rabbitmq", "ingress", 5671, "allocator to RabbitMQ, port 5671 is needed, but not allowed"),
        ("rabbitmq", "ingress", 15671, "rabbitmq-system to RabbitMQ, port 15671 is needed, but not allowed"),
        ("rabbitmq", "ingress", 15691, "Prometheus to RabbitMQ, port 15691 is needed, but not allowed"),
        ("postgres", "ingress", 9187, "Prometheus to PostgreSQL, port 9187 is needed, but not allowed"),
        ("reaper", "egress", 3128, "reaper to the forward proxy, port 3128 is needed, but not allowed"),
        ("dns", "egress", 5353, "gateway to DNS of OpenShift, port 5353 is needed, but not allowed"),
    ],
)
def test_missing_port_is_reported(
    manifests: list[Any], policy: str, direction: str, port: int, message: str
) -> None:
    for rule in policy_ports(manifests, policy, direction):
        if rule["port"] == port:
            rule["port"] = 9

    assert f"NetworkPolicy: {message}" in list(network_policies.find_problems(manifests))


def test_another_address_of_the_proxy_is_reported(manifests: list[Any]) -> None:
    for manifest in manifests:
        if manifest["kind"] == "ConfigMap" and "HTTPS_PROXY" in manifest["data"]:
            manifest["data"]["HTTPS_PROXY"] = "http://192.0.2.11:3128"

    assert any(
        "csp-syncer to the forward proxy, port 3128 is needed" in problem
        for problem in network_policies.find_problems(manifests)
    )


def test_direct_way_to_csp_beside_the_proxy_is_reported(manifests: list[Any]) -> None:
    find(manifests, "NetworkPolicy", "reaper")["spec"]["egress"].append(
        {"to": [{"ipBlock": {"cidr": "203.0.113.0/24"}}], "ports": [{"port": 443}]}
    )

    assert list(network_policies.find_problems(manifests)) == [
        "NetworkPolicy: reaper to CSP, port 443 is allowed, but the code does not need it"
    ]


def test_plain_port_of_rabbitmq_is_needed_without_tls(manifests: list[Any]) -> None:
    find(manifests, "RabbitmqCluster", "rabbitmq")["spec"].pop("tls")
    for rule in policy_ports(manifests, "gateway", "egress"):
        if rule["port"] == 5672:
            rule["port"] = 9

    assert any(
        "gateway to RabbitMQ, port 5672 is needed" in problem
        for problem in network_policies.find_problems(manifests)
    )


def test_proxy_variable_of_a_service_without_csp_is_reported(manifests: list[Any]) -> None:
    assert programs.list_proxy_variables(programs.SERVICES["reaper"]) == {"HTTPS_PROXY", "NO_PROXY"}
    assert programs.list_proxy_variables(programs.SERVICES["gateway"]) == set()


# Gateway API


def test_route_to_a_missing_service_or_port_is_reported(manifests: list[Any]) -> None:
    (backend,) = find(manifests, "HTTPRoute", "gateway")["spec"]["rules"][0]["backendRefs"]
    backend["port"] = 8081
    (backend,) = find(manifests, "HTTPRoute", "gateway-admin")["spec"]["rules"][0]["backendRefs"]
    backend["name"] = "gatewy"

    problems = list(references.find_problems(manifests))

    assert "HTTPRoute gateway: Service gateway has no port 8081" in problems
    assert "HTTPRoute gateway-admin: Service gatewy does not exist" in problems


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "gateway-admin",
            lambda spec: spec["parentRefs"][0].update(name="public"),
            "HTTPRoute gateway-admin: publishes the admin API on the Gateway of the track routes, gateways/public",
        ),
        (
            "gateway",
            lambda spec: spec["rules"][0]["matches"][1]["path"].update(value="/v1"),
            "HTTPRoute gateway-admin: publishes the admin API, and so does HTTPRoute gateway: publish it once",
        ),
        (
            "gateway",
            lambda spec: spec["rules"][0].pop("matches"),
            "HTTPRoute gateway: /metrics must stay inside the cluster",
        ),
        (
            "gateway",
            lambda spec: spec["parentRefs"][0].pop("sectionName"),
            "HTTPRoute gateway: set sectionName to the listener with TLS, or port 80 serves it, too",
        ),
    ],
)
def test_exposed_route_is_reported(manifests: list[Any], name: str, change: Change, message: str) -> None:
    change(find(manifests, "HTTPRoute", name)["spec"])

    assert message in list(exposure.find_problems(manifests))


def test_proxies_of_the_gateway_in_another_namespace_are_reported(manifests: list[Any]) -> None:
    peer = find(manifests, "NetworkPolicy", "gateway")["spec"]["ingress"][0]["from"][0]
    peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"] = "ingress-nginx"

    problems = list(network_policies.find_problems(manifests))

    assert (
        "NetworkPolicy: the proxy of the Gateway API to gateway, port 8080 is needed, but not allowed" in problems
    )
    assert any("the ingress controller to gateway, port 8080 is allowed" in problem for problem in problems)


# Secrets


def test_missing_and_unused_external_secrets_are_reported(manifests: list[Any]) -> None:
    find(manifests, "ExternalSecret", "postgres-owner")["metadata"]["name"] = "postgres-ownr"

    assert list(secret_references.find_problems(manifests)) == [
        "ExternalSecret postgres-owner: does not exist, but the manifests refer to it",
        "ExternalSecret postgres-ownr: no manifest refers to its secret",
    ]


def create_secrets(overlay: str) -> dict[str, dict[str, str]]:
    """Run create-secrets.sh. Return the values by secret and key."""
    result = subprocess.run(
        ["sh", K8S / "create-secrets.sh", overlay],
        env={
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "CSP_API_TOKEN": "token-of-csp",
            "NAMESPACE": "labs",
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    secrets = [secret for secret in yaml.safe_load_all(result.stdout) if secret]
    assert {secret["metadata"]["namespace"] for secret in secrets} == {"labs"}
    return {
        secret["metadata"]["name"]: {key: base64.b64decode(value).decode() for key, value in secret["data"].items()}
        for secret in secrets
    }


@pytest.mark.parametrize("overlay", ["dev", "prod", "prod-tls"])
def test_script_creates_the_secrets_that_an_overlay_refers_to(
    manifests: list[Any], overlay: str, tmp_path: Path
) -> None:
    for name in ("postgres.crt", "rabbitmq.crt"):  # the settings require that the files exist
        (tmp_path / name).touch()
    expected = list(manifests) if overlay == "prod-tls" else build_overlay(K8S / "overlays" / overlay)

    secrets = create_secrets(overlay)

    keys = {name: set(values) for name, values in secrets.items()}
    if overlay == "prod":
        keys["keda"].discard("TLS")  # only components/tls refers to it
    assert keys == secret_references.list_secret_keys(expected)
    for name, program in (*programs.SERVICES.items(), ("migration", programs.COMMANDS["sandbox_broker.migrate"])):
        values: dict[str, Any] = {
            key.lower(): value.replace(AUTHORITIES, str(tmp_path)) for key, value in secrets[name].items()
        }
        program.settings(_env_file=None, **values)
    if overlay != "dev":
        for service in ("gateway", "allocator", "reaper", "csp-syncer", "provisioner", "migration", "keda"):
            assert (
                f"//{service}:{secrets[f'rabbitmq-{service}']['password']}@rabbitmq" in secrets[service]["AMQP_URL"]
            )
        for service, server in (("gateway", "gateway"), ("allocator", "allocator"), ("migration", "owner")):
            login = secrets[f"postgres-{server}"]
            assert f"//{login['username']}:{login['password']}@postgres-rw:" in secrets[service]["DATABASE_URL"]
    passwords = [value for secret in secrets.values() for key, value in secret.items() if "pass" in key.lower()]
    assert len(set(passwords)) == len(passwords)
    assert {len(password) for password in passwords} == {48}


def test_urls_with_tls_name_files_that_the_pods_have(manifests: list[Any]) -> None:
    secrets = create_secrets("prod-tls")

    (mount,) = find(manifests, "Job", "migration")["spec"]["template"]["spec"]["containers"][1]["volumeMounts"]
    (volume,) = find(manifests, "Deployment", "gateway")["spec"]["template"]["spec"]["volumes"]
    files = {
        f"{mount['mountPath']}/{item['path']}"
        for source in volume["projected"]["sources"]
        for item in source["secret"]["items"]
    }
    assert {secrets["gateway"]["DATABASE_URL"].partition("sslrootcert=")[2]} <= files
    assert {url.partition("cafile=")[2] for url in split_amqp_urls(secrets["reaper"]["AMQP_URL"])} <= files


def test_amqp_url_names_every_node_of_the_cluster(manifests: list[Any]) -> None:
    cluster = find(manifests, "RabbitmqCluster", "rabbitmq")
    name, replicas = cluster["metadata"]["name"], cluster["spec"]["replicas"]
    page = (ROOT / "docs" / "deployment.md").read_text()

    urls = split_amqp_urls(create_secrets("prod-tls")["gateway"]["AMQP_URL"])

    hosts = [amqp_host(url).host for url in urls]
    assert hosts == [f"{name}-server-{number}.{name}-nodes" for number in range(replicas)]
    assert {amqp_host(url).port for url in urls} == {5671}
    for host in hosts:
        assert f"      - {host}" in page, "the certificate needs this name"


def test_script_without_the_token_of_csp_stops(tmp_path: Path) -> None:
    result = subprocess.run(
        ["sh", K8S / "create-secrets.sh", "prod"],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert (result.returncode != 0, result.stdout) == (True, "")
    assert "set it to the token of CSP" in result.stderr


# Versions of the operators


def build_deployment(image: str) -> dict[str, Any]:
    return {"kind": "Deployment", "spec": {"template": {"spec": {"containers": [{"image": image}]}}}}


def build_definition(group: str, annotation: str, version: str) -> dict[str, Any]:
    return {
        "kind": "CustomResourceDefinition",
        "metadata": {"annotations": {annotation: version}},
        "spec": {"group": group},
    }


MINIMUM_CLUSTER = (
    build_deployment("ghcr.io/cloudnative-pg/cloudnative-pg:1.28.0"),
    build_deployment("ghcr.io/rabbitmq/cluster-operator:2.17.0"),
    build_deployment("registry:5000/messaging-topology-operator:v1.18.3@sha256:00"),
    build_deployment("ghcr.io/kedacore/keda:2.18.0"),
    build_deployment("quay.io/prometheus-operator/prometheus-operator:v0.60.0"),
    build_deployment("ghcr.io/external-secrets/external-secrets:v0.16.0"),
    build_definition("gateway.networking.k8s.io", "gateway.networking.k8s.io/bundle-version", "v1.2.0"),
)


def test_minimum_and_newer_versions_have_no_problems(manifests: list[Any]) -> None:
    assert list(operators.find_problems(manifests, MINIMUM_CLUSTER)) == []
    newer = [build_deployment("cloudnative-pg:1.100.0"), *MINIMUM_CLUSTER[1:]]
    assert list(operators.find_problems(manifests, newer)) == []
    assert list(operators.find_problems(manifests, [])) == []


@pytest.mark.parametrize(
    ("index", "older", "problem"),
    [
        (0, build_deployment("cloudnative-pg:1.27.9"), "CloudNativePG 1.28 is required, but the cluster has 1.27"),
        (
            1,
            build_deployment("cluster-operator:2.9.0"),
            "RabbitMQ Cluster Operator 2.17 is required, but the cluster has 2.9",
        ),
        (3, build_deployment("keda:2.17.3"), "KEDA 2.18 is required, but the cluster has 2.17"),
        (
            3,
            build_deployment("keda-metrics-apiserver:2.18.0"),
            "KEDA 2.18 is required, but no Deployment runs the image keda",
        ),
        (
            6,
            build_definition("gateway.networking.k8s.io", "gateway.networking.k8s.io/bundle-version", "v1.1.0"),
            "Gateway API 1.2 is required, but the cluster has 1.1",
        ),
    ],
)
def test_older_or_missing_operator_is_reported(
    manifests: list[Any], index: int, older: dict[str, Any], problem: str
) -> None:
    cluster = list(MINIMUM_CLUSTER)
    cluster[index] = older

    assert list(operators.find_problems(manifests, cluster)) == [problem]


def test_operator_that_the_manifests_do_not_use_is_not_required() -> None:
    assert list(operators.find_problems(build_overlay(K8S / "overlays" / "dev"), MINIMUM_CLUSTER[:1])) == []


# Documents


def test_documented_tags_are_those_of_the_overlays() -> None:
    page = (K8S / "README.md").read_text()
    version = yaml.safe_load((K8S / "overlays/prod/kustomization.yaml").read_text())["images"][0]["newTag"]
    images = {
        (overlay, image["name"].rpartition("/")[2], image["newTag"])
        for overlay in ("dev", "prod")
        for image in yaml.safe_load((K8S / f"overlays/{overlay}/kustomization.yaml").read_text())["images"]
    }

    assert images == {("dev", name, "dev") for name in programs.SERVICES} | {
        ("prod", name, version) for name in programs.SERVICES
    }
    assert "--tag sandbox-broker/$service:dev" in page
    assert f"--tag registry.example.com/sandbox-broker/$service:{version}" in page
    assert f'\nversion = "{version}"\n' in (ROOT / "services/gateway/pyproject.toml").read_text()


def test_documentation_names_each_secret_and_each_component() -> None:
    page = (ROOT / "docs" / "deployment.md").read_text()
    walk = (K8S / "README.md").read_text()
    for overlay in ("dev", "prod"):
        for name, keys in secret_references.list_secret_keys(build_overlay(K8S / "overlays" / overlay)).items():
            assert {f"`{name}`", *(f"`{key}`" for key in keys)} <= tokens(page), name
    for path in K8S.glob("*/*/kustomization.yaml"):
        folder = str(path.parent.relative_to(K8S))
        assert folder.startswith("base/") or f"`{folder}`" in page, folder
    for component in list_optional_components(K8S):
        assert f"../../components/{component.name} " in walk, component.name


def tokens(page: str) -> set[str]:
    return {f"`{part}`" for part in page.split("`")[1::2]}
