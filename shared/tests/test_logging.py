"""Log lines: one for each thing, in one form, whoever writes them; no secrets."""

import json
import os
import subprocess
import sys

import pytest

PROGRAM = """
import logging, sys
import structlog
from sandbox_broker import logging as ours
from sandbox_broker.settings import ServiceSettings

ours.configure(ServiceSettings(_env_file=None), "gateway")
log = structlog.get_logger()

def fail():
    password = "hunter2"
    raise ValueError("boom")

log.debug("lease.looked_up")
log.info("lease.granted", sandbox_id="7", holder="several\\nlines", odd=object())
logging.getLogger("uvicorn.error").warning("took %s s", 3)
logging.getLogger("uvicorn.error").info("chatter")
logging.getLogger("aiormq.connection").error("a traceback for each lost connection")
try:
    fail()
except ValueError:
    log.exception("lease.failed")
    logging.getLogger("asyncio").exception("Task exception was never retrieved")
"""


def lines(log_format: str, level: str = "INFO") -> list[str]:
    environment = {**os.environ, "AMQP_URL": "amqp://h/", "LOG_FORMAT": log_format, "LOG_LEVEL": level}
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True
    )
    assert ended.stderr == ""
    return ended.stdout.splitlines()


def test_every_line_is_json_of_the_same_form() -> None:
    entries = [json.loads(line) for line in lines("json")]
    assert [(entry["event"], entry["level"]) for entry in entries] == [
        ("lease.granted", "info"),
        ("took 3 s", "warning"),
        ("lease.failed", "error"),
        ("Task exception was never retrieved", "error"),
    ]
    for entry in entries:
        assert entry["service"] == "gateway"
        assert entry["timestamp"].endswith("Z")
    assert entries[0]["sandbox_id"] == "7"
    for entry in entries[2:]:
        assert entry["exception"][0]["exc_type"] == "ValueError"
        assert entry["exception"][0]["frames"][-1]["name"] == "fail"


def test_a_level_lets_more_or_less_through() -> None:
    assert len(lines("json", "DEBUG")) == len(lines("json", "INFO")) + 1
    assert len(lines("json", "ERROR")) == 2


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_local_variables(log_format: str) -> None:
    text = "\n".join(lines(log_format))
    assert "boom" in text
    assert "hunter2" not in text


def test_the_console_form_is_for_the_eye() -> None:
    text = "\n".join(lines("console"))
    assert "lease.granted" in text
    assert "sandbox_id=7" in text
    assert "\x1b" not in text  # it is no terminal
