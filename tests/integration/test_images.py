"""What the images and docker-compose.yml say, without a Docker."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from devstack import locks
from k8s_check.programs import COMMANDS, SERVICES, Program
from tests.integration.stack import ROOT, Stack

SCRIPTS = ROOT / "deploy" / "image"
COMPOSE: Mapping[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
PROGRAMS: Mapping[str, Program] = {
    **SERVICES,
    "migration": COMMANDS["sandbox_broker.migrate"],
    "queues": COMMANDS["sandbox_broker.declare"],
}


def ask(service: str, port: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    variable = f"{service.upper().replace('-', '_')}_PORT"
    return subprocess.run(
        [sys.executable, SCRIPTS / "healthy.py", *arguments],
        env={"SERVICE": service, variable: port, "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_health_check_tells_a_service_that_answers_from_one_that_does_not(stack: Stack) -> None:
    port = stack.environment["CSP_SYNCER_PORT"]

    assert ask("csp-syncer", port).returncode == 0
    ready = ask("csp-syncer", port, "/readyz")
    assert (ready.returncode, "ready" in ready.stdout) == (0, True)
    assert ask("csp-syncer", port, "/nothing").returncode == 1
    refused = ask("gateway", "1")
    assert (refused.returncode, "refused" in refused.stdout, refused.stderr) == (1, True, "")


@pytest.mark.parametrize("service", SERVICES)
def test_an_image_starts_the_service_it_was_built_for(service: str, tmp_path: Path) -> None:
    started = subprocess.run(
        [sys.executable, SCRIPTS / "serve.py"],
        env={"SERVICE": service, "PATH": os.environ["PATH"]},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    missing = "; ".join(f"{name.upper()}: is not set" for name in _in_order(SERVICES[service]))
    assert (started.returncode, started.stderr) == (2, f"cannot start: {missing}\n")


def test_a_stop_that_comes_before_the_service_is_up_is_obeyed(tmp_path: Path) -> None:
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
        connection, _ = silent.accept()  # it asks whether the servers answer
        with connection:
            starting.send_signal(signal.SIGTERM)

            assert starting.wait(timeout=60) == 0


def _in_order(program: Program) -> list[str]:
    return [name for name, field in program.settings.model_fields.items() if field.is_required()]


@pytest.mark.parametrize("service", PROGRAMS)
def test_in_compose_every_setting_reaches_the_service_that_reads_it_and_no_other(service: str) -> None:
    program = PROGRAMS[service]
    # The ports are those of the image, whatever is published.
    settings = program.fields - {program.port}

    assert {name.lower() for name in COMPOSE[service]["environment"]} == settings


@pytest.mark.parametrize("service", [*PROGRAMS, "accounts", "csp-simulator"])
def test_in_compose_services_write_nothing_and_may_nothing(service: str) -> None:
    described = COMPOSE[service]

    assert described["read_only"] is True
    assert described["cap_drop"] == ["ALL"]
    assert described["security_opt"] == ["no-new-privileges:true"]


def test_in_compose_each_service_is_an_image_of_its_own_from_its_own_lock() -> None:
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


def test_prometheus_asks_every_service_where_its_image_answers() -> None:
    configured = yaml.safe_load((ROOT / "deploy" / "prometheus" / "prometheus.yml").read_text())
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in configured["scrape_configs"]}

    ports = {
        name: program.settings.model_fields[program.port].default
        for name, program in SERVICES.items()
        if program.port
    }
    assert targets["sandbox-broker"] == [f"{name}:{port}" for name, port in ports.items()]
    assert targets["rabbitmq"] == ["rabbitmq:15692"]
