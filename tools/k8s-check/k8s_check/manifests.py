"""Manifests of an overlay after kustomize, and look-ups in them."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Manifest = Mapping[str, Any]

BUILD_TIMEOUT_SEC = 300

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The loader in C takes a small part of the time. A PyYAML that was built without libyaml lacks it."""


class BuildError(Exception):
    """Kustomize is not installed, or it rejects the overlay."""


def load_yaml(text: str) -> list[Any]:
    """Return the documents of `text` that are not empty."""
    return [document for document in yaml.load_all(text, Loader=_LOADER) if document]


def build_overlay(overlay: Path) -> list[Manifest]:
    """Run kustomize for the overlay's folder. Raises `BuildError`."""
    result = subprocess.run(
        [*_find_kustomize(), str(overlay)], capture_output=True, text=True, timeout=BUILD_TIMEOUT_SEC, check=False
    )
    if result.returncode != 0:
        raise BuildError(result.stderr.strip())
    return load_yaml(result.stdout)


def build_with_components(overlay: Path, components: Sequence[Path]) -> list[Manifest]:
    """Build an overlay of its own that adds `components` to `overlay`. Raises `BuildError`."""
    with tempfile.TemporaryDirectory() as folder:
        kustomization = {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "namespace": "sandbox-broker",
            "resources": [os.path.relpath(overlay.resolve(), Path(folder).resolve())],
            "components": [os.path.relpath(path.resolve(), Path(folder).resolve()) for path in components],
        }
        (Path(folder) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
        return build_overlay(Path(folder))


def _find_kustomize() -> Sequence[str]:
    """Prefer the kubectl of the locked requirements. Its package does not exist for every platform."""
    locked_kubectl = Path(sys.executable).parent / "kubectl"
    kubectl = str(locked_kubectl) if locked_kubectl.exists() else shutil.which("kubectl")
    if kubectl is not None:
        return [kubectl, "kustomize"]
    if (kustomize := shutil.which("kustomize")) is not None:
        return [kustomize, "build"]
    raise BuildError("kubectl and kustomize are missing: install one of them")


def format_title(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def select_kind(manifests: Sequence[Manifest], kind: str) -> Iterator[Manifest]:
    return (manifest for manifest in manifests if manifest["kind"] == kind)


def find_manifest(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest | None:
    return next(
        (manifest for manifest in select_kind(manifests, kind) if manifest["metadata"]["name"] == name), None
    )


@dataclass(frozen=True, slots=True)
class PodTemplate:
    """Pod template of a Deployment, StatefulSet, DaemonSet or Job."""

    title: str
    name: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


@dataclass(frozen=True, slots=True)
class OperatorPods:
    """Pods that an operator creates for a custom resource, with the labels and the priority that they get."""

    title: str
    labels: Mapping[str, str]
    priority_class: str | None


def list_operator_pods(manifests: Sequence[Manifest]) -> list[OperatorPods]:
    """List the pods of the servers. Their custom resources have no complete pod template."""
    pods = []
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "Cluster":
            labels = spec["inheritedMetadata"]["labels"]
            pods.append(OperatorPods(format_title(manifest), labels, spec.get("priorityClassName")))
        elif manifest["kind"] == "RabbitmqCluster":
            labels = {"app.kubernetes.io/name": manifest["metadata"]["name"]}  # set by the operator
            priority_class = override_pod_spec(manifest).get("priorityClassName")
            pods.append(OperatorPods(format_title(manifest), labels, priority_class))
    return pods


def override_pod_spec(cluster: Manifest) -> Mapping[str, Any]:
    """Return the fields of the pod that a RabbitmqCluster overrides."""
    spec: Mapping[str, Any] = cluster["spec"]
    for field in ("override", "statefulSet", "spec", "template", "spec"):
        spec = spec.get(field, {})
    return spec


def list_pod_templates(manifests: Sequence[Manifest]) -> list[PodTemplate]:
    """List the pod templates in the manifests. `list_operator_pods` has the pods without one."""
    return [
        PodTemplate(
            format_title(manifest),
            manifest["metadata"]["name"],
            manifest["spec"]["template"].get("metadata", {}).get("labels", {}),
            manifest["spec"]["template"]["spec"],
        )
        for manifest in manifests
        if manifest["kind"] in {"Deployment", "StatefulSet", "DaemonSet", "Job"}
    ]


def is_selector_match(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """Check labels against a label selector. An empty selector matches all labels."""
    terms = selector or {}
    if "matchExpressions" in terms:
        raise ValueError("matchExpressions are not supported here: use matchLabels")
    return all(labels.get(name) == value for name, value in terms.get("matchLabels", {}).items())
