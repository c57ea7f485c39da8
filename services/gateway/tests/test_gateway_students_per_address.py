"""Count of the students per client address."""

import time

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.web.rate_limit import Rate
from gateway.web.students_per_address import StudentsPerAddress

from .gateway_harness import TRACK, create_app_without_servers, sample


def count_addresses() -> float:
    return sample("broker_addresses_with_many_students_total")


async def test_an_address_with_many_students_is_counted_and_logged() -> None:
    app = create_app_without_servers(students_per_address_alert="2/10 minutes")
    transport = httpx.ASGITransport(app=app, client=("192.0.2.1", 4711))
    before, counts = count_addresses(), []
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        with capture_logs() as logs:
            for student in ("ada", "ada", "grace", "ada", "alan", "mary"):
                await http.post("/v1/allocate", headers={**TRACK, "X-Instruqt-Sandbox-ID": student})
                counts.append(count_addresses() - before)
            await http.post("/v1/allocate", headers={"X-Instruqt-Sandbox-ID": "without a token"})
    assert counts == [0, 0, 0, 0, 1, 1]
    assert [(line["client"], line["limit"]) for line in logs if line["event"] == "client.many_students"] == [
        ("192.0.2.1", 2)
    ]


async def test_without_a_limit_no_address_is_counted() -> None:
    app = create_app_without_servers(students_per_address_alert="")
    assert app.state.context.students_per_address is None


def test_each_address_is_counted_once_per_window(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    students, before = StudentsPerAddress(Rate(1, 60)), count_addresses()
    for student in ("ada", "grace", "alan"):
        students.count("192.0.2.1", student)
    students.count("192.0.2.2", "ada")
    assert count_addresses() - before == 1
    now += 60
    for student in ("ada", "grace"):
        students.count("192.0.2.1", student)
    assert count_addresses() - before == 2


def test_the_default_suits_a_class_of_300_behind_one_address() -> None:
    students, before = create_app_without_servers().state.context.students_per_address, count_addresses()
    for play in range(3):
        for number in range(300):
            students.count("192.0.2.1", f"student-{number}-{play}")
    assert count_addresses() == before
    for number in range(101):
        students.count("192.0.2.1", f"invented-{number}")
    assert count_addresses() == before + 1
