"""Log lines: one format for all loggers, the log context, redaction and the log rate limit."""

import json
import os
import re
import subprocess
import sys
from collections import Counter
from functools import cache

import pytest

from sandbox_broker.observability.log_rate_limit import LINES

PROGRAM = """
import logging, sys
import structlog
from sandbox_broker.observability import logging as ours
from sandbox_broker.runtime.settings import ServiceSettings

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


REPEATED = """
import logging
import structlog
from sandbox_broker.observability import logging as ours
from sandbox_broker.observability import log_context
from sandbox_broker.runtime.settings import ServiceSettings

ours.configure(ServiceSettings(_env_file=None), "reaper")
log = structlog.get_logger()
with log_context.bound(request_id="r"):
    log.info("lease.ended", holder="ada")
    logging.getLogger("asyncio").warning("slow")
for number in range(1000):
    log.info("lease.granted", number=number)
    log.error("database.lost", number=number)
    logging.getLogger("uvicorn.error").warning("number %s", number)
log.warning("database.reconnecting", error="amqp://reaper:of-the-queue@h/ refused")
logging.getLogger("asyncio").warning("of-the-queue")
"""

FREQUENT = """
import structlog
from sandbox_broker.observability import frequent_log, log_context
from sandbox_broker.observability import logging as ours
from sandbox_broker.runtime.settings import ServiceSettings

log = structlog.get_logger()
frequent_log.info("before.configured")
ours.configure(ServiceSettings(_env_file=None), "reaper")
for info in (log.info, frequent_log.info):
    info("lease.granted", request_id="r", holder="several\\nlines", odd=Exception("x"), track_name=None)
    info("lease.granted", url="amqp://reaper:of-the-queue@h/")
    with log_context.bound(batch_id="b", holder="of the batch"):
        info("lease.granted", holder="ada")
"""
"""Each line twice: as structlog writes it, and the short way."""


@cache
def lines(log_format: str, level: str = "INFO", program: str = PROGRAM) -> list[str]:
    """Return the output of a program. Its process takes most of the time of a test, so each runs only once."""
    environment = {
        **os.environ,
        "AMQP_URL": "amqp://reaper:of-the-queue@h/",
        "LOG_FORMAT": log_format,
        "LOG_LEVEL": level,
    }
    ended = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
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


def test_the_level_filters_lines() -> None:
    assert len(lines("json", "DEBUG")) == len(lines("json", "INFO")) + 1
    assert len(lines("json", "ERROR")) == 2


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_tracebacks_show_no_local_variables(log_format: str) -> None:
    text = "\n".join(lines(log_format))
    assert "boom" in text
    assert "hunter2" not in text


def test_the_console_format_is_readable_text() -> None:
    text = "\n".join(lines("console"))
    assert "lease.granted" in text
    assert "sandbox_id=7" in text
    assert "\x1b" not in text  # because the output is not a terminal


def test_repeated_errors_are_counted_after_the_limit() -> None:
    entries = [json.loads(line) for line in lines("json", program=REPEATED)]
    written = Counter(entry["event"] for entry in entries if not entry["event"].startswith("number"))
    assert written["lease.granted"] == 1000  # info lines have no limit
    assert written["database.lost"] == LINES
    assert sum(entry["event"].startswith("number") for entry in entries) == LINES
    assert written["database.reconnecting"] == 1
    suppressed = {
        entry["suppressed_event"]: entry["lines"] for entry in entries if entry["event"] == "log.suppressed"
    }
    assert suppressed == {"database.lost": 1000 - LINES, "uvicorn.error": 1000 - LINES}


def test_every_line_has_the_ids_of_the_log_context() -> None:
    ours, foreign, other = (json.loads(line) for line in lines("json", program=REPEATED)[:3])
    assert (ours["request_id"], ours["holder"]) == ("r", "ada")
    assert foreign["request_id"] == "r"
    assert "request_id" not in other


@pytest.mark.parametrize("log_format", ["json", "console"])
def test_no_line_of_any_logger_has_a_secret(log_format: str) -> None:
    text = "\n".join(lines(log_format, program=REPEATED))
    assert text.count("***") == 2
    assert "of-the-queue" not in text


@pytest.mark.parametrize(("log_format", "level"), [("json", "INFO"), ("json", "WARNING"), ("console", "INFO")])
def test_frequent_lines_are_those_of_structlog(log_format: str, level: str) -> None:
    first, *written = lines(log_format, level, FREQUENT)
    assert "before.configured" in first
    assert len(written) == (6 if level == "INFO" else 0)
    usual, frequent = [
        [
            re.sub(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z", "<time>", line)
            for line in half
        ]
        for half in (written[:3], written[3:])
    ]
    assert usual == frequent
    assert sum("<time>" in line for line in usual) == len(usual)
