"""Startup of a service, in a process of its own: it configures the loggers of the process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from devstack.ports import free_port

PROGRAM = """
import sys
import structlog
from sandbox_broker.runtime import settings, startup

prepared = startup.prepare(getattr(settings, sys.argv[1]), "example")
structlog.get_logger().info("example.started", level_of_logs=prepared.log_level)
"""


def start(tmp_path: Path, settings: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, settings],
        cwd=tmp_path,  # a directory without .env
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("settings", ["ServiceSettings", "DatabaseSettings"])
def test_startup_returns_the_settings_and_configures_logs(
    tmp_path: Path, settings: str, amqp_url: str, database_url: str
) -> None:
    started = start(tmp_path, settings, AMQP_URL=amqp_url, DATABASE_URL=database_url, LOG_LEVEL="info")
    assert (started.returncode, started.stderr) == (0, "")
    line = json.loads(started.stdout)
    assert (line["service"], line["event"], line["level_of_logs"]) == ("example", "example.started", "INFO")


def test_startup_reports_an_invalid_setting_in_one_line(tmp_path: Path) -> None:
    started = start(tmp_path, "DatabaseSettings", DATABASE_URL="postgresql://localhost/none")
    assert (started.returncode, started.stdout) == (2, "")
    assert started.stderr == "cannot start: AMQP_URL: is not set\n"


def test_startup_checks_the_database_of_a_service_with_a_database(tmp_path: Path, amqp_url: str) -> None:
    nowhere = {"AMQP_URL": amqp_url, "DATABASE_URL": f"postgresql://127.0.0.1:{free_port()}/none"}
    assert start(tmp_path, "ServiceSettings", **nowhere).returncode == 0
    started = start(tmp_path, "DatabaseSettings", **nowhere)
    assert started.returncode == 2
    assert started.stderr.startswith("cannot start: DATABASE_URL: ")
    assert started.stderr.count("\n") == 1
