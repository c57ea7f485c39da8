"""Mistakes in a copy of deploy/: building and checking its overlays must report each of them."""

import shutil
from pathlib import Path

import pytest

from k8s_check import operators
from k8s_check.main import ROOT, list_optional_components, main

DEPLOYMENT = "k8s/base/gateway/deployment.yaml"
POLICY = "k8s/base/reaper/networkpolicy.yaml"


@pytest.fixture
def deploy(tmp_path: Path) -> Path:
    copy = tmp_path / "deploy"
    shutil.copytree(ROOT / "deploy", copy)
    for part in ("overlays/dev", "components/postgres", "components/rabbitmq"):  # to save time
        shutil.rmtree(copy / "k8s" / part)
    return copy


def test_our_overlays_have_no_problems(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("file", "original", "mistake", "problem"),
    [
        (
            DEPLOYMENT,
            "containerPort: 8080",
            "containerPort: 8081",
            "Deployment gateway, container gateway: port 8081 is declared, but the program serves 8080, 9100",
        ),
        (
            "k8s/base/gateway/kustomization.yaml",
            "GATEWAY_PORT=8080",
            "GATEWAY_PORT=8081",
            "Deployment gateway, container gateway: port 8080 is declared, but the program serves 8081, 9100",
        ),
        (
            "k8s/base/gateway/kustomization.yaml",
            "- LOG_LEVEL=INFO",
            "- LOG_LEVLE=INFO",
            "Deployment gateway, container gateway: LOG_LEVLE is not a setting of this program",
        ),
        (
            "k8s/base/reaper/deployment.yaml",
            "- name: CSP_API_TOKEN",
            "- name: CSP_TOKEN",
            "Deployment reaper, container reaper: CSP_API_TOKEN is required, but not set",
        ),
        (
            DEPLOYMENT,
            "readinessProbe:\n            httpGet: {path: /readyz",
            "readinessProbe:\n            httpGet: {path: /ready",
            "Deployment gateway, container gateway: readinessProbe: /ready is not served",
        ),
        (
            "k8s/base/gateway/kustomization.yaml",
            "      - OPS_PORT=9100\n",
            "",
            "Deployment gateway, container gateway: port 9100 is declared, but the program serves 8080",
        ),
        (
            "k8s/base/gateway/kustomization.yaml",
            "OPS_PORT=9100",
            "OPS_PORT=8080",
            "Deployment gateway, container gateway: OPS_PORT: Value error, must differ from GATEWAY_PORT",
        ),
        (
            DEPLOYMENT,
            "livenessProbe:\n            httpGet: {path: /healthz, port: ops}",
            "livenessProbe:\n            httpGet: {path: /healthz, port: http}",
            "Deployment gateway, container gateway: livenessProbe: /healthz is served on port 9100, not on 8080",
        ),
        (
            "k8s/overlays/prod/kustomization.yaml",
            "name: http",
            "name: ops",
            "Ingress gateway: gateway does not serve /v1 on port 9100",
        ),
        (
            "k8s/base/gateway/networkpolicy.yaml",
            "port: 9100}",
            "port: 8080}",
            "NetworkPolicy: Prometheus to gateway, port 9100 is needed, but not allowed",
        ),
        (
            "k8s/base/gateway/networkpolicy.yaml",
            "ports:\n        - {protocol: TCP, port: 8080}",
            "ports:\n        - {protocol: TCP, port: 8080}\n        - {protocol: TCP, port: 9100}",
            "NetworkPolicy: the ingress controller to gateway, port 9100 is allowed, but the code does not need it",
        ),
        (
            POLICY,
            "port: 443}",
            "port: 8443}",
            "NetworkPolicy: reaper to CSP, port 443 is needed, but not allowed",
        ),
        (
            POLICY,
            "app.kubernetes.io/name: rabbitmq",
            "app.kubernetes.io/name: gateway",
            "NetworkPolicy: reaper to RabbitMQ, port 5672 is needed, but not allowed",
        ),
        (
            "k8s/components/admin-ingress/kustomization.yaml",
            "path: /v1/allocate",
            "path: /v1/alocate",
            "prod-separate-admin: Ingress gateway: gateway serves no path for /v1/alocate (exact)",
        ),
        (
            "k8s/components/admin-ingress/kustomization.yaml",
            "path: /v1/sandboxes",
            "path: /v1",
            "Ingress gateway: publishes the admin API without the allow-list of Ingress gateway-admin",
        ),
        (
            "k8s/components/admin-ingress/ingress.yaml",
            "path: /v1",
            "path: /",
            "prod-separate-admin: Ingress gateway-admin: /metrics must stay inside the cluster",
        ),
        (
            "k8s/base/gateway/horizontalpodautoscaler.yaml",
            "minReplicas",
            "minimumReplicas",
            "HorizontalPodAutoscaler gateway: Kubernetes",
        ),
        (
            "prometheus/alerts.yml",
            "for: 2m",
            "for: 3m",
            "PrometheusRule sandbox-broker: differs from deploy/prometheus/alerts.yml: run make docs",
        ),
        (
            "k8s/components/prometheus-operator/podmonitor.yaml",
            "port: ops",
            "port: http",
            "Deployment gateway: no PodMonitor scrapes it as job sandbox-broker",
        ),
        (
            "k8s/components/prometheus-operator/podmonitor.yaml",
            "jobLabel: app.kubernetes.io/part-of",
            "jobLabel: app.kubernetes.io/name",
            "Deployment gateway: no PodMonitor scrapes it as job sandbox-broker",
        ),
    ],
)
def test_mistake_in_a_file_is_reported(
    deploy: Path, capsys: pytest.CaptureFixture[str], file: str, original: str, mistake: str, problem: str
) -> None:
    if "horizontal" in file:  # the keda component removes this manifest
        overlay = deploy / "k8s/overlays/prod/kustomization.yaml"
        overlay.write_text(overlay.read_text().replace("  - ../../components/keda\n", ""))
    if "admin-ingress" not in file:
        shutil.rmtree(deploy / "k8s/overlays/prod-separate-admin")
    for component in list_optional_components(deploy / "k8s"):
        if component.name not in file:
            shutil.rmtree(component)
    path = deploy / file
    assert original in path.read_text()
    path.write_text(path.read_text().replace(original, mistake, 1))

    assert main(["--deploy", str(deploy)]) == 1

    assert problem in capsys.readouterr().err


def test_each_optional_component_is_built_alone_and_with_the_others(
    deploy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (deploy / "k8s/components/tls/kustomization.yaml").write_text("nonsense")

    assert main(["--deploy", str(deploy)]) == 2

    output = capsys.readouterr()
    assert "prod with tls: " in output.err
    for component in ("admin-ingress", "csp-proxy", "external-secrets", "gateway-api"):
        assert f"prod with {component}: " in output.out


def test_table_of_operators_in_the_documentation_is_compared(
    tmp_path: Path,
) -> None:
    page = tmp_path / "deployment.md"
    page.write_text((ROOT / "docs" / "deployment.md").read_text().replace("| KEDA | 2.18 |", "| KEDA | 2.17 |"))

    (problem,) = operators.find_documentation_problems(page)

    assert problem.startswith("deployment.md: its table of operators differs")


def test_build_failure_is_reported_with_its_reason(deploy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (deploy / "k8s/base/gateway/service.yaml").unlink()

    assert main(["--deploy", str(deploy)]) == 2

    assert "service.yaml" in capsys.readouterr().err
