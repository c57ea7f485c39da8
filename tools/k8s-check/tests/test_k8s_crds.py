"""Custom resources, validated against a definition like those of the operators."""

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
VALID_SPEC = {
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
    return crds.build_schemas(crds.load_resources([file]))


def build_scaled_object(spec: Any) -> dict[str, Any]:
    return {"apiVersion": "keda.sh/v1alpha1", "kind": "ScaledObject", "metadata": {"name": "gateway"}, "spec": spec}


def test_valid_resource_has_no_problems(schemas: crds.Schemas) -> None:
    assert (
        list(
            crds.find_problems(
                [build_scaled_object(VALID_SPEC), build_scaled_object({**VALID_SPEC, "port": 80, "limit": 3})],
                schemas,
            )
        )
        == []
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targte": "gateway"}, "'targte' was unexpected"),
        ({"target": 7}, "rejects spec.target: 7 is not of type 'string'"),
        ({"limit": "3"}, "rejects spec.limit"),
        ({"labels": {"any": 1}}, "rejects spec.labels.any"),
        ({"triggers": [{"nmae": "cpu"}]}, "rejects spec.triggers.0: Additional properties"),
    ],
)
def test_invalid_or_unknown_field_is_reported(schemas: crds.Schemas, change: Any, message: str) -> None:
    (problem,) = crds.find_problems([build_scaled_object({**VALID_SPEC, **change})], schemas)

    assert problem.startswith("ScaledObject gateway: its definition rejects")
    assert message in problem


def test_missing_field_is_reported(schemas: crds.Schemas) -> None:
    assert "'target' is a required property" in "".join(crds.find_problems([build_scaled_object({})], schemas))


def test_kind_without_a_definition_is_reported() -> None:
    assert "--crds has no keda.sh/v1alpha1 ScaledObject" in "".join(
        crds.find_problems([build_scaled_object({})], {})
    )


def test_command_line_names_the_definition_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "crds.yaml"
    file.write_text(DEFINITION)

    assert main(["--crds", str(file)]) == 1
    errors = capsys.readouterr().err
    assert "ScaledObject gateway: its definition rejects spec" in errors
    assert "RabbitmqCluster rabbitmq: --crds has no" in errors
