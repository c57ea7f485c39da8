"""An overlay as Kubernetes would get it."""

import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Manifest = Mapping[str, Any]

BUILD_SEC = 300


class CannotBuild(Exception):
    """No program that builds overlays, or one that refuses this overlay."""


def build(overlay: Path) -> list[Manifest]:
    """Raises CannotBuild."""
    done = subprocess.run(
        [*_builder(), str(overlay)], capture_output=True, text=True, timeout=BUILD_SEC, check=False
    )
    if done.returncode != 0:
        raise CannotBuild(done.stderr.strip())
    return [manifest for manifest in yaml.safe_load_all(done.stdout) if manifest]


def _builder() -> Sequence[str]:
    """The kubectl of the locked requirements; where its package does not exist, what is on the machine."""
    beside = Path(sys.executable).parent / "kubectl"
    kubectl = str(beside) if beside.exists() else shutil.which("kubectl")
    if kubectl is not None:
        return [kubectl, "kustomize"]
    if (kustomize := shutil.which("kustomize")) is not None:
        return [kustomize, "build"]
    raise CannotBuild("needs kubectl or kustomize: install one of them")


def title(manifest: Manifest) -> str:
    return f"{manifest['kind']} {manifest['metadata']['name']}"


def of_kind(manifests: Sequence[Manifest], kind: str) -> Iterator[Manifest]:
    return (manifest for manifest in manifests if manifest["kind"] == kind)


def named(manifests: Sequence[Manifest], kind: str, name: str) -> Manifest | None:
    return next((found for found in of_kind(manifests, kind) if found["metadata"]["name"] == name), None)


@dataclass(frozen=True, slots=True)
class Pods:
    """Pods that one manifest makes."""

    title: str
    name: str
    labels: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def pods(manifests: Sequence[Manifest]) -> list[Pods]:
    """Those that we describe ourselves; the operators' are theirs."""
    return [
        Pods(
            title(manifest),
            manifest["metadata"]["name"],
            manifest["spec"]["template"].get("metadata", {}).get("labels", {}),
            manifest["spec"]["template"]["spec"],
        )
        for manifest in manifests
        if manifest["kind"] in {"Deployment", "StatefulSet", "DaemonSet", "Job"}
    ]


def selects(selector: Mapping[str, Any] | None, labels: Mapping[str, str]) -> bool:
    """A label selector; an empty one selects everything."""
    wanted = selector or {}
    if "matchExpressions" in wanted:
        raise ValueError("matchExpressions are not understood here: use matchLabels")
    return all(labels.get(name) == value for name, value in wanted.get("matchLabels", {}).items())
