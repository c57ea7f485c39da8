"""Users, permissions and policies of RabbitMQ: the manifests must match deploy/rabbitmq/definitions.json."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from k8s_check.manifests import Manifest, find_manifest, select_kind


def find_problems(manifests: Sequence[Manifest], deploy: Path) -> Iterator[str]:
    if not any(select_kind(manifests, "RabbitmqCluster")):
        return
    definitions: dict[str, Any] = json.loads((deploy / "rabbitmq" / "definitions.json").read_text())
    permissions = {entry["user"]: entry for entry in definitions["permissions"]}
    for user, entry in permissions.items():
        if find_manifest(manifests, "User", user) is None:
            yield f"User {user} does not exist"
        permission = find_manifest(manifests, "Permission", user)
        expected = {kind: entry[kind] for kind in ("configure", "write", "read")}
        if permission is None or permission["spec"]["permissions"] != expected:
            yield f"Permission {user}: deploy/rabbitmq/definitions.json has {expected}"
    for user in {manifest["metadata"]["name"] for manifest in select_kind(manifests, "User")} - set(permissions):
        yield f"User {user}: deploy/rabbitmq/definitions.json has no such user"
    for policy in definitions["policies"]:
        manifest = find_manifest(manifests, "Policy", policy["name"])
        expected = {"pattern": policy["pattern"], "applyTo": policy["apply-to"], "definition": policy["definition"]}
        if manifest is None or {name: manifest["spec"].get(name) for name in expected} != expected:
            yield f"Policy {policy['name']}: deploy/rabbitmq/definitions.json has {expected}"
