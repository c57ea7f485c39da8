"""Scripts of the images and docker-compose.yml, tested without Docker."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from dotenv import dotenv_values
from pydantic import ValidationError
from pydantic_settings import BaseSettings

from devstack import locks, settings
from devstack.ports import free_port
from k8s_check.programs import COMMANDS, SERVICES, Program
from tests.integration.stack import ROOT, Stack

SCRIPTS = ROOT / "deploy" / "image"
FILL_ENV = ROOT / "deploy" / "compose" / "fill-env.sh"
COMPOSE_FILE = ROOT / "docker-compose.yml"
COMPOSE: Mapping[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())["services"]
PROGRAMS: Mapping[str, Program] = {
    **SERVICES,
    "migration": COMMANDS["sandbox_broker.migrate"],
    "queues": COMMANDS["sandbox_broker.declare"],
}


def run_health_check(service: str, port: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    variable = f"{service.upper().replace('-', '_')}_PORT"
    return subprocess.run(
        [sys.executable, SCRIPTS / "healthy.py", *arguments],
        env={"SERVICE": service, variable: port, "PATH": os.environ["PATH"], **settings},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_health_check_detects_whether_a_service_responds(stack: Stack) -> None:
    port = stack.environment["CSP_SYNCER_PORT"]

    assert run_health_check("csp-syncer", port).returncode == 0
    ready = run_health_check("csp-syncer", port, "/readyz")
    assert (ready.returncode, "ready" in ready.stdout) == (0, True)
    assert run_health_check("csp-syncer", port, "/nothing").returncode == 1
    refused = run_health_check("gateway", "1")
    assert (refused.returncode, "refused" in refused.stdout, refused.stderr) == (1, True, "")


async def test_the_health_check_uses_the_listen_address_of_the_service(stack: Stack) -> None:
    main, ops = str(free_port()), str(free_port())
    settings = {"GATEWAY_PORT": main, "OPS_PORT": ops, "BIND_HOST": "::1,127.0.0.2"}
    gateway, _ = await stack.launch("gateway", name="gateway on other addresses", settings=settings)
    try:
        await stack.until_ready(f"http://[::1]:{ops}/readyz", gateway)
        ready = run_health_check("gateway", main, "/readyz", OPS_PORT=ops, BIND_HOST="127.0.0.2, ::1")
        assert (ready.returncode, "ready" in ready.stdout) == (0, True)
        assert run_health_check("gateway", main, "/readyz", OPS_PORT=ops).returncode == 0  # IPv6 after IPv4
        assert run_health_check("gateway", main, "/readyz").returncode == 1
        assert run_health_check("gateway", main, "/readyz", OPS_PORT=ops, BIND_HOST="127.0.0.1").returncode == 1
        # Other services have no OPS_PORT and ignore the variable.
        assert run_health_check("csp-syncer", stack.environment["CSP_SYNCER_PORT"], OPS_PORT=ops).returncode == 0
    finally:
        await gateway.stop()


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_starts_its_service(service: str, tmp_path: Path) -> None:
    started = subprocess.run(
        [sys.executable, SCRIPTS / "serve.py"],
        env={"SERVICE": service, "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    missing = "; ".join(f"{name.upper()}: is not set" for name in _required_settings(SERVICES[service]))
    assert (started.returncode, started.stderr) == (2, f"cannot start: {missing}\n")


def test_a_stop_during_the_start_is_obeyed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(60)
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        starting = subprocess.Popen(
            [sys.executable, SCRIPTS / "serve.py"],
            env={
                "SERVICE": "allocator",
                "PATH": os.environ["PATH"],
                "AMQP_URL": f"amqp://guest:guest@{address}/",
                "DATABASE_URL": f"postgresql://postgres@{address}/none",
            },
            cwd=tmp_path,
        )
        connection, _ = silent.accept()  # the preflight check connects to the servers
        with connection:
            starting.send_signal(signal.SIGTERM)

            assert starting.wait(timeout=60) == 0


def _required_settings(program: Program) -> list[str]:
    return [name for name, field in program.settings.model_fields.items() if field.is_required()]


@pytest.mark.parametrize("service", PROGRAMS)
def test_in_compose_each_service_gets_exactly_its_settings(service: str) -> None:
    program = PROGRAMS[service]
    # The port is fixed in the image. BIND_HOST is not passed on, because a published port needs the container to
    # listen on all of its addresses.
    settings = program.fields - {program.port, "bind_host"}

    assert {name.lower() for name in COMPOSE[service]["environment"]} == settings


@pytest.mark.parametrize("service", [*PROGRAMS, "accounts", "csp-simulator"])
def test_in_compose_services_are_read_only_and_unprivileged(service: str) -> None:
    described = COMPOSE[service]

    assert described["read_only"] is True
    assert described["cap_drop"] == ["ALL"]
    assert described["security_opt"] == ["no-new-privileges:true"]


def test_in_compose_each_service_has_its_own_image_and_lock_file() -> None:
    built = {
        name: described["build"]["args"]["SERVICE"]
        for name, described in COMPOSE.items()
        if "build" in described and name not in {"accounts", "migration", "queues", "csp-simulator"}
    }

    assert built == {name: name for name in locks.SERVICES}
    assert all((ROOT / "requirements" / f"{name}.txt").exists() for name in built)


def test_the_ports_of_the_images_are_the_defaults_of_the_settings() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()

    for program in SERVICES.values():
        assert program.port is not None
        default = program.settings.model_fields[program.port].default
        assert f"{program.port.upper()}={default}" in dockerfile


def test_prometheus_scrapes_the_port_of_every_image() -> None:
    configured = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in configured["scrape_configs"]}

    ports = {
        name: program.settings.model_fields[program.port].default
        for name, program in SERVICES.items()
        if program.port
    }
    ports["gateway"] = int(COMPOSE["gateway"]["environment"]["OPS_PORT"])
    assert targets["sandbox-broker"] == [f"{name}:{port}" for name, port in ports.items()]
    assert targets["rabbitmq"] == ["rabbitmq:15692"]


REQUIRED = re.compile(r"\$\{(\w+):\?")
"""Matches a required variable of docker-compose.yml."""


def parse_variables(text: str) -> dict[str, str]:
    return {name: value or "" for name, value in dotenv_values(stream=io.StringIO(text)).items()}


def fill_env(path: Path) -> dict[str, str]:
    subprocess.run(["sh", FILL_ENV, path], check=True, capture_output=True)
    return parse_variables(path.read_text())


def test_in_compose_no_password_and_no_token_has_a_default() -> None:
    text = COMPOSE_FILE.read_text()
    used = set(re.findall(r"\$\{(\w*(?:PASSWORD|TOKEN))\b", text))
    assert len(used) > 10
    assert not re.search(r"\$\{\w*(?:PASSWORD|TOKEN):?-", text)
    assert used <= set(REQUIRED.findall(text))


def test_fill_env_sets_every_required_secret(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text((ROOT / ".env.example").read_text())
    path.chmod(0o644)

    values = fill_env(path)

    secrets = {name: values[name] for name in REQUIRED.findall(COMPOSE_FILE.read_text())}
    assert all(re.fullmatch(r"[0-9a-f]{48}", value) for value in secrets.values())
    assert len(set(secrets.values())) == len(secrets)
    assert path.stat().st_mode & 0o777 == 0o600
    assert fill_env(path) == values
    assert list(tmp_path.iterdir()) == [path]


def test_fill_env_keeps_existing_values(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("# PASSWORD=\nPOSTGRES_PASSWORD=mine\nRABBITMQ_PASSWORD=\nLOG_LEVEL=\nNIOSXAAS_EMAIL=a b")

    values = fill_env(path)

    assert values.pop("RABBITMQ_PASSWORD")
    assert values == {"POSTGRES_PASSWORD": "mine", "LOG_LEVEL": "", "NIOSXAAS_EMAIL": "a b"}
    assert path.read_text().startswith("# PASSWORD=\n")


def test_fill_env_generates_no_token_of_a_real_csp(tmp_path: Path) -> None:
    path = tmp_path / ".env"
    path.write_text("CSP_API_TOKEN=\nBROKER_API_TOKEN=\nCSP_BASE_URL=https://csp.example/v2\n")

    values = fill_env(path)

    assert values["CSP_API_TOKEN"] == ""
    assert values["BROKER_API_TOKEN"]


def test_in_compose_every_port_is_published_on_loopback_by_default() -> None:
    published = [port for described in COMPOSE.values() for port in described.get("ports", [])]
    assert len(published) == 6
    assert all(port.startswith(("127.0.0.1:", "${GATEWAY_BIND:-127.0.0.1}:")) for port in published)


def test_in_compose_only_services_with_a_port_or_calls_to_csp_are_on_the_outer_network() -> None:
    networks = yaml.safe_load(COMPOSE_FILE.read_text())["networks"]
    assert networks == {"inner": {"internal": True}, "outer": None}
    for name, described in COMPOSE.items():
        needs_outer = "ports" in described or "CSP_BASE_URL" in described.get("environment", {})
        assert ("outer" in described["networks"]) is needs_outer, name
    assert {name for name, described in COMPOSE.items() if described["networks"] == ["outer"]} == {
        "csp-simulator",
        "grafana",
    }


@pytest.mark.parametrize("service", ["reaper", "csp-syncer", "provisioner"])
def test_in_compose_http_is_allowed_only_for_the_simulator(service: str) -> None:
    environment = COMPOSE[service]["environment"]
    url, allowed = (
        re.fullmatch(rf"\$\{{{name}:-(.*)\}}", environment[name]) for name in ("CSP_BASE_URL", "ALLOW_INSECURE_CSP")
    )
    assert url is not None
    assert allowed is not None

    def settings(csp_base_url: str) -> BaseSettings:
        return SERVICES[service].settings(
            _env_file=None,
            amqp_url="amqp://rabbitmq/",
            csp_api_token="of-the-simulator",
            csp_base_url=csp_base_url,
            allow_insecure_csp=allowed[1],
        )

    settings(url[1])
    with pytest.raises(ValidationError, match="must begin with https://"):
        settings("http://csp.example/v2")


def test_every_image_has_a_minor_version() -> None:
    """The rule is in docs/deployment.md. The images of this project have the version of the release."""
    texts = {path: path.read_text() for path in (COMPOSE_FILE, ROOT / "Dockerfile", ROOT / ".env.example")}
    texts |= {path: path.read_text() for path in (ROOT / "deploy" / "k8s").rglob("*.yaml")}
    images = {
        image
        for text in texts.values()
        for image in re.findall(
            r"(?<![\w/.])(?:[\w.-]+/)*(?:postgres|postgresql|rabbitmq|python|prometheus|grafana):[\w.-]+", text
        )
        if not re.fullmatch(r"\w+:\d{4,5}", image)  # host and port
    }
    assert {image.partition(":")[0].rpartition("/")[2] for image in images} == {
        "postgres",
        "postgresql",
        "rabbitmq",
        "python",
        "prometheus",
        "grafana",
    }
    images |= {settings.POSTGRES_IMAGE, settings.RABBITMQ_IMAGE}
    assert {image for image in images if not re.search(r":v?\d+\.\d+", image)} == set()
