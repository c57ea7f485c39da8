"""The restricted profile of Pod Security, and what we ask of every pod beyond it."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k8s_check.manifests import Manifest, pods

_VOLUMES = {
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
_SECCOMP = {"RuntimeDefault", "Localhost"}
_SYSCTLS = {
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
_SELINUX = {None, "", "container_t", "container_init_t", "container_kvm_t", "container_engine_t"}


def problems(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        yield from (f"{pod.title}: {problem}" for problem in _pod(pod.spec))
        for container in pod.containers:
            own = container.get("securityContext", {})
            context = {**pod.spec.get("securityContext", {}), **own}
            found = [*_container(container, own), *_context(context)]
            yield from (f"{pod.title}, container {container['name']}: {problem}" for problem in found)


def _pod(spec: Mapping[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"{field} is not allowed"
    for volume in spec.get("volumes", []):
        if other := set(volume) - {"name"} - _VOLUMES:
            yield f"a volume of the kind {', '.join(sorted(other))} is not allowed"
    for sysctl in spec.get("securityContext", {}).get("sysctls", []):
        if sysctl["name"] not in _SYSCTLS:
            yield f"the sysctl {sysctl['name']} is not allowed"
    if spec.get("automountServiceAccountToken") is not False:
        yield "must set automountServiceAccountToken to false"
    if spec.get("enableServiceLinks") is not False:
        yield "must set enableServiceLinks to false: its variables have the names of our settings"


def _container(container: Mapping[str, Any], own: Mapping[str, Any]) -> Iterator[str]:
    """What holds only where the container itself says it."""
    if own.get("privileged"):
        yield "privileged is not allowed"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "must set allowPrivilegeEscalation to false"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "must set readOnlyRootFilesystem to true"
    if own.get("procMount", "Default") != "Default":
        yield "must leave procMount alone"
    capabilities = own.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", []):
        yield "must drop ALL capabilities"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "must add no capability"
    if any("hostPort" in port for port in container.get("ports", [])):
        yield "must take no port of the host"
    requests, limits = (container.get("resources", {}).get(kind, {}) for kind in ("requests", "limits"))
    if not {"cpu", "memory"} <= set(requests) or "memory" not in limits:
        yield "must request cpu and memory, and limit memory"


def _context(context: Mapping[str, Any]) -> Iterator[str]:
    """What the container says, or else its pod."""
    if context.get("runAsNonRoot") is not True:
        yield "must set runAsNonRoot to true"
    if context.get("runAsUser") == 0:
        yield "must not run as root"
    if context.get("seccompProfile", {}).get("type") not in _SECCOMP:
        yield "must have the seccomp profile RuntimeDefault"
    if context.get("appArmorProfile", {}).get("type", "RuntimeDefault") == "Unconfined":
        yield "must not be unconfined by AppArmor"
    options = context.get("seLinuxOptions", {})
    if options.get("type") not in _SELINUX or options.get("user") or options.get("role"):
        yield "must leave SELinux alone"
