"""Command line of the checks: build every overlay and print its problems."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from k8s_check import (
    availability,
    containers,
    crds,
    exposure,
    monitoring,
    network_policies,
    operators,
    pod_security,
    rabbitmq_users,
    references,
    schemas,
    secret_references,
)
from k8s_check.manifests import BuildError, Manifest, build_overlay, build_with_components

ROOT = Path(__file__).resolve().parents[3]


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 without problems, 1 with one printed line per problem, 2 if an overlay cannot be built."""
    parser = argparse.ArgumentParser(prog="k8s_check")
    parser.add_argument("--deploy", type=Path, default=ROOT / "deploy", help="default: %(default)s")
    parser.add_argument(
        "--crds",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="resources of the cluster: CustomResourceDefinitions, to check the kinds of the operators, too, and "
        "Deployments, to check the versions of the operators",
    )
    options = parser.parse_args(arguments)
    deploy: Path = options.deploy
    resources = crds.load_resources(options.crds or [])
    builds = _list_builds(deploy / "k8s")
    if not builds:
        print(f"no overlays below {deploy}", file=sys.stderr)
        return 2
    passed = True
    for name, overlay, components in builds:
        try:
            manifests = build_with_components(overlay, components) if components else build_overlay(overlay)
        except BuildError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        problems = list(find_problems(manifests, deploy))
        if options.crds is not None:
            problems += crds.find_problems(manifests, crds.build_schemas(resources))
            problems += operators.find_problems(manifests, resources)
        for problem in problems:
            print(f"{name}: {problem}", file=sys.stderr)
        if problems:
            passed = False
        else:
            versions = " and ".join(schemas.VERSIONS)
            print(f"{name}: {len(manifests)} manifests are valid for Kubernetes {versions}")
    for problem in operators.find_documentation_problems(ROOT / "docs" / "deployment.md"):
        print(problem, file=sys.stderr)
        passed = False
    return 0 if passed else 1


def _list_builds(folder: Path) -> list[tuple[str, Path, list[Path]]]:
    """List name, overlay and components of each build.

    Build every overlay, then `prod` with each optional component, then `prod` with all of them.
    """
    overlays = sorted(path.parent for path in folder.glob("overlays/*/kustomization.yaml"))
    builds: list[tuple[str, Path, list[Path]]] = [(overlay.name, overlay, []) for overlay in overlays]
    components = list_optional_components(folder)
    for chosen in [*([component] for component in components), components]:
        if chosen:
            name = f"prod with {', '.join(component.name for component in chosen)}"
            builds.append((name, folder / "overlays" / "prod", chosen))
    return builds


def list_optional_components(folder: Path) -> list[Path]:
    """List the components that neither `dev` nor `prod` contains."""
    used = {
        (overlay.parent / component).resolve()
        for overlay in folder.glob("overlays/*/kustomization.yaml")
        for component in yaml.safe_load(overlay.read_text()).get("components", [])
        if overlay.parent.name in ("dev", "prod")
    }
    return sorted({path.parent.resolve() for path in folder.glob("components/*/kustomization.yaml")} - used)


def find_problems(manifests: Sequence[Manifest], deploy: Path) -> Iterator[str]:
    """Yield one line per problem. It names the manifest and the expected value."""
    yield from schemas.find_problems(manifests)
    yield from pod_security.find_problems(manifests)
    yield from references.find_problems(manifests)
    yield from secret_references.find_problems(manifests)
    yield from availability.find_problems(manifests)
    yield from containers.find_problems(manifests)
    yield from network_policies.find_problems(manifests)
    yield from exposure.find_problems(manifests)
    yield from rabbitmq_users.find_problems(manifests, deploy)
    yield from monitoring.find_problems(manifests, deploy)
