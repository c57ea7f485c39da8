"""Operators' kinds, by a definition such as an operator brings along."""

from pathlib import Path
from typing import Any

import pytest

from k8s_check import crds
from k8s_check.main import main

DEFINITION = """
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata: {name: scaledobjects.keda.sh}
spec:
  group: keda.sh
  names: {kind: ScaledObject}
  versions:
    - name: v1alpha1
      schema:
        openAPIV3Schema:
          type: object
          properties:
            apiVersion: {type: string}
            kind: {type: string}
            metadata: {type: object}
            spec:
              type: object
              required: [target]
              properties:
                target: {type: string}
                port: {x-kubernetes-int-or-string: true}
                limit: {type: integer, nullable: true}
                free:
                  type: object
                  x-kubernetes-preserve-unknown-fields: true
                  properties: {known: {type: string}}
                labels: {type: object, additionalProperties: {type: string}}
                triggers: {type: array, items: {type: object, properties: {name: {type: string}}}}
"""
LIST = "kind: List\nitems:\n- " + DEFINITION.strip().replace("\n", "\n  ")
RIGHT = {
    "target": "gateway",
    "port": "http",
    "limit": None,
    "free": {"known": "a", "unknown": 1},
    "labels": {"any": "text"},
    "triggers": [{"name": "cpu"}],
}


@pytest.fixture(
    params=[DEFINITION, LIST, f"kind: Namespace\n---\n{DEFINITION}---\n"], ids=["one", "list", "among others"]
)
def schemas(request: pytest.FixtureRequest, tmp_path: Path) -> crds.Schemas:
    file = tmp_path / "crds.yaml"
    file.write_text(request.param)
    return crds.load([file])


def scaled(spec: Any) -> dict[str, Any]:
    return {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "gateway"}, "spec": spec}


def test_what_the_operator_takes_is_fine(schemas: crds.Schemas) -> None:
    assert list(crds.problems([scaled(RIGHT), scaled({**RIGHT, "port": 80, "limit": 3})], schemas)) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"targte": "gateway"}, "'targte' was unexpected"),
        ({"target": 7}, "refuses spec.target: 7 is not of type 'string'"),
        ({"limit": "3"}, "refuses spec.limit"),
        ({"labels": {"any": 1}}, "refuses spec.labels.any"),
        ({"triggers": [{"nmae": "cpu"}]}, "refuses spec.triggers.0: Additional properties"),
    ],
)
def test_what_the_operator_refuses_or_drops_is_told(schemas: crds.Schemas, change: Any, told: str) -> None:
    (problem,) = crds.problems([scaled({**RIGHT, **change})], schemas)

    assert problem.startswith("ScaledObject gateway: its operator refuses")
    assert told in problem


def test_what_is_missing_is_told(schemas: crds.Schemas) -> None:
    assert "'target' is a required property" in "".join(crds.problems([scaled({})], schemas))


def test_a_kind_without_a_definition_is_told() -> None:
    assert "no definition of keda.sh/v1alpha1 ScaledObject was given" in "".join(crds.problems([scaled({})], {}))


def test_the_definitions_are_named_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "crds.yaml"
    file.write_text(DEFINITION)

    assert main(["--crds", str(file)]) == 1
    told = capsys.readouterr().err
    assert "ScaledObject gateway: its operator refuses spec" in told
    assert "RabbitmqCluster rabbitmq: no definition of" in told
