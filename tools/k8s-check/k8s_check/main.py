"""Command line of the checks: build every overlay and print its problems."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from k8s_check import (
    containers,
    crds,
    exposure,
    monitoring,
    network_policies,
    pod_security,
    rabbitmq_users,
    references,
    schemas,
)
from k8s_check.manifests import BuildError, Manifest, build_overlay

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
        help="CustomResourceDefinitions of the operators, to check the operators' kinds too",
    )
    options = parser.parse_args(arguments)
    deploy: Path = options.deploy
    crd_schemas = None if options.crds is None else crds.load_schemas(options.crds)
    overlays = sorted(path.parent for path in deploy.glob("k8s/overlays/*/kustomization.yaml"))
    if not overlays:
        print(f"no overlays below {deploy}", file=sys.stderr)
        return 2
    passed = True
    for overlay in overlays:
        try:
            manifests = build_overlay(overlay)
        except BuildError as error:
            print(f"{overlay.name}: {error}", file=sys.stderr)
            return 2
        problems = list(find_problems(manifests, deploy))
        if crd_schemas is not None:
            problems += crds.find_problems(manifests, crd_schemas)
        for problem in problems:
            print(f"{overlay.name}: {problem}", file=sys.stderr)
        if problems:
            passed = False
        else:
            versions = " and ".join(schemas.VERSIONS)
            print(f"{overlay.name}: {len(manifests)} manifests are valid for Kubernetes {versions}")
    return 0 if passed else 1


def find_problems(manifests: Sequence[Manifest], deploy: Path) -> Iterator[str]:
    """Yield one line per problem. It names the manifest and the expected value."""
    yield from schemas.find_problems(manifests)
    yield from pod_security.find_problems(manifests)
    yield from references.find_problems(manifests)
    yield from containers.find_problems(manifests)
    yield from network_policies.find_problems(manifests)
    yield from exposure.find_problems(manifests)
    yield from rabbitmq_users.find_problems(manifests, deploy)
    yield from monitoring.find_problems(manifests, deploy)
