import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from k8s_check import crds, exposure, monitoring, network, references, restricted, schemas, users, wiring
from k8s_check.manifests import CannotBuild, Manifest, build

ROOT = Path(__file__).resolve().parents[3]


def main(arguments: Sequence[str] | None = None) -> int:
    """0 when all is well, 1 with a line for each problem, 2 when nothing could be checked."""
    parser = argparse.ArgumentParser(prog="k8s_check")
    parser.add_argument("--deploy", type=Path, default=ROOT / "deploy", help="default: %(default)s")
    parser.add_argument(
        "--crds",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="CustomResourceDefinitions of the operators: judge their kinds too",
    )
    options = parser.parse_args(arguments)
    deploy: Path = options.deploy
    operators = None if options.crds is None else crds.load(options.crds)
    overlays = sorted(path.parent for path in deploy.glob("k8s/overlays/*/kustomization.yaml"))
    if not overlays:
        print(f"no overlays below {deploy}", file=sys.stderr)
        return 2
    fine = True
    for overlay in overlays:
        try:
            manifests = build(overlay)
        except CannotBuild as error:
            print(f"{overlay.name}: {error}", file=sys.stderr)
            return 2
        found = list(problems(manifests, deploy))
        if operators is not None:
            found += crds.problems(manifests, operators)
        for problem in found:
            print(f"{overlay.name}: {problem}", file=sys.stderr)
        if found:
            fine = False
        else:
            versions = " and ".join(schemas.VERSIONS)
            print(f"{overlay.name}: {len(manifests)} manifests are fine for Kubernetes {versions}")
    return 0 if fine else 1


def problems(manifests: Sequence[Manifest], deploy: Path) -> Iterator[str]:
    """A line for each, naming the manifest and what it should be."""
    yield from schemas.problems(manifests)
    yield from restricted.problems(manifests)
    yield from references.problems(manifests)
    yield from wiring.problems(manifests)
    yield from network.problems(manifests)
    yield from exposure.problems(manifests)
    yield from users.problems(manifests, deploy)
    yield from monitoring.problems(manifests, deploy)
