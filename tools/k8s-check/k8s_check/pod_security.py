"""Pod Security: the restricted profile, and stricter rules of this project for every pod."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s_check.manifests import Manifest, list_pod_templates

_ALLOWED_VOLUME_TYPES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
_ALLOWED_SECCOMP_TYPES = {"RuntimeDefault", "Localhost"}
_ALLOWED_SYSCTLS = {
    "kernel.shm_rmid_forced",
    "net.ipv4.ip_local_port_range",
    "net.ipv4.ip_unprivileged_port_start",
    "net.ipv4.tcp_syncookies",
    "net.ipv4.ping_group_range",
    "net.ipv4.ip_local_reserved_ports",
    "net.ipv4.tcp_keepalive_time",
    "net.ipv4.tcp_fin_timeout",
    "net.ipv4.tcp_keepalive_intvl",
    "net.ipv4.tcp_keepalive_probes",
}
_ALLOWED_SELINUX_TYPES = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def find_problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in list_pod_templates(manifests):
        yield from (f"{pod.title}: {problem}" for problem in _check_pod(pod.spec))
        for container in pod.containers:
            own = container.get("securityContext", {})
            context = {**pod.spec.get("securityContext", {}), **own}
            problems = [*_check_container(container, own), *_check_security_context(context)]
            yield from (f"{pod.title}, container {container['name']}: {problem}" for problem in problems)


def _check_pod(spec: Mapping[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"{field} is not allowed"
    for volume in spec.get("volumes", []):
        if forbidden := set(volume) - {"name"} - _ALLOWED_VOLUME_TYPES:
            yield f"volume type {', '.join(sorted(forbidden))} is not allowed"
    for sysctl in spec.get("securityContext", {}).get("sysctls", []):
        if sysctl["name"] not in _ALLOWED_SYSCTLS:
            yield f"the sysctl {sysctl['name']} is not allowed"
    if spec.get("automountServiceAccountToken") is not False:
        yield "must set automountServiceAccountToken to false"
    if spec.get("enableServiceLinks") is not False:
        yield "must set enableServiceLinks to false, because its variables have the names of our settings"


def _check_container(container: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """Check fields that a container must set itself, because its pod cannot set them."""
    if own.get("privileged"):
        yield "privileged is not allowed"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "must set allowPrivilegeEscalation to false"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "must set readOnlyRootFilesystem to true"
    if own.get("procMount", "Default") != "Default":
        yield "must not change procMount"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "must drop ALL capabilities"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "must not add capabilities"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "must not use hostPort"
    requests, limits = (container.get("resources", {}).get(kind, {}) for kind in ("requests", "limits"))
    if not {"cpu", "memory"} <= set(requests) or "memory" not in limits:
        yield "must request cpu and memory, and limit memory"


def _check_security_context(context: Mapping[str, Any]) -> Iterator[str]:
    """Check the container's security context merged over its pod's."""
    if context.get("runAsNonRoot") is not True:
        yield "must set runAsNonRoot to true"
    if context.get("runAsUser") == 0:
        yield "must not run as root"
    if context.get("seccompProfile", {}).get("type") not in _ALLOWED_SECCOMP_TYPES:
        yield "must have the seccomp profile RuntimeDefault"
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") == "Unconfined":
        yield "must not have the AppArmor profile Unconfined"
    options = context.get("seLinuxOptions", {})
    if options.get("type") not in _ALLOWED_SELINUX_TYPES or options.get("user") or options.get("role"):
        yield "must not change seLinuxOptions"
