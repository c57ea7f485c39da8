"""RabbitMQ's users and policies as manifests, against the definitions beside them."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from k8s_check.manifests import Manifest, named, of_kind


def problems(manifests: Sequence[Manifest], deploy: Path) -> Iterator[str]:
    if not any(of_kind(manifests, "RabbitmqCluster")):
        return
    definitions: dict[str, Any] = json.loads((deploy / "rabbitmq" / "definitions.json").read_text())
    permissions = {entry["user"]: entry for entry in definitions["permissions"]}
    for user, entry in permissions.items():
        if named(manifests, "User", user) is None:
            yield f"there is no User {user}"
        found = named(manifests, "Permission", user)
        wanted = {kind: entry[kind] for kind in ("configure", "write", "read")}
        if found is None or found["spec"]["permissions"] != wanted:
            yield f"Permission {user}: deploy/rabbitmq/definitions.json has {wanted}"
    for extra in {found["metadata"]["name"] for found in of_kind(manifests, "User")} - set(permissions):
        yield f"User {extra}: deploy/rabbitmq/definitions.json has no such user"
    for policy in definitions["policies"]:
        found = named(manifests, "Policy", policy["name"])
        wanted = {"pattern": policy["pattern"], "applyTo": policy["apply-to"], "definition": policy["definition"]}
        if found is None or {name: found["spec"].get(name) for name in wanted} != wanted:
            yield f"Policy {policy['name']}: deploy/rabbitmq/definitions.json has {wanted}"
