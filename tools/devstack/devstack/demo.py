"""`make demo`: `make run` with simulated class days at 100 times their speed."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
from aio_pika import Message
from aio_pika.exceptions import AMQPError

from devstack import class_day, docker, pool, ports, prometheus
from devstack import settings as environment
from devstack.class_day import DAY_END_MIN, DAY_START_MIN, STOCK_PREFIX, Incident, Lesson, Student, format_time
from devstack.errors import CannotRun
from devstack.main import SERVICES, Launcher, admin_token, run_stack
from devstack.output import Terminal
from devstack.settings import Settings
from sandbox_broker.messaging.connection import open_connection

SPEED = 100
ACCOUNTS = 150
PROMETHEUS_PORT = 9090
SCRAPE_SEC = 2.0
_MINUTE_SEC = 60 / SPEED
_ASK_AGAIN_SEC = 30 / SPEED
_PATIENCE_MIN = 60
"""A student retries for this time. The Instruqt script gives up after two minutes."""
_REVOKED_TOKEN_REQUESTS = 40
STOCK_POLICY = {
    "name": "exam",
    "match": {"name_prefix": STOCK_PREFIX},
    "stock": {"name_prefix": STOCK_PREFIX, "min": 2, "max": 40},
}
"""A class of this policy arrives at a nearly empty pool."""
_CREATION_SEC = 150 / SPEED

# Durations of the services are divided by SPEED, like the day.
DEFAULTS = {
    "LOG_LEVEL": "ERROR",
    "RATE_LIMIT": "",  # all students come from one address
    "LAB_DURATION_HOURS": str(4 / SPEED),
    "GRACE_PERIOD_MINUTES": str(30 / SPEED),
    "SYNC_INTERVAL_SEC": str(600 / SPEED),
    "AUTO_EXPIRY_INTERVAL_SEC": str(60 / SPEED),
    "CLEANUP_INTERVAL_SEC": str(300 / SPEED),
    "CLEANUP_BATCH_DELAY_SEC": str(2 / SPEED),
    "DELETION_BACKOFF_BASE_SEC": str(30 / SPEED),
    "DELETION_BACKOFF_MAX_SEC": str(3600 / SPEED),
    "DELETION_MAX_ATTEMPTS": "4",
    "CIRCUIT_BREAKER_TIMEOUT_SEC": str(60 / SPEED),
    "STOCK_ENABLED": "true",
    "STOCK_INTERVAL_SEC": str(60 / SPEED),
    "CREATE_PER_MINUTE": "1000",
    "CREATE_CONCURRENCY": "4",
    "CREATE_TIMEOUT_SEC": "10",  # a busy machine needs longer than a hundredth of the default
    "CREATE_BACKOFF_BASE_SEC": str(30 / SPEED),
    "CREATE_BACKOFF_MAX_SEC": str(900 / SPEED),
    "CREATE_SYNC_SEC": "1",  # a hundredth of the default would keep the csp-syncer busy
}


def main(root: Path = environment.ROOT) -> int:
    return run_stack("make demo", lambda: load(root=root), follow_up=play_days, accounts=ACCOUNTS)


def load(environ: Mapping[str, str] | None = None, root: Path = environment.ROOT) -> Settings:
    settings = environment.load(environ, root, defaults=DEFAULTS, demo=True)
    if settings.csp_base_url is not None:
        raise CannotRun("the demo needs the CSP simulator; unset CSP_BASE_URL")
    return settings


async def play_days(launcher: Launcher, stack: AsyncExitStack) -> None:
    """Play one day after another until the task is cancelled."""
    settings, terminal = launcher.settings, launcher.terminal
    for line in await _monitoring_lines(settings, stack, terminal):
        terminal.print_line(line)
    async with httpx.AsyncClient(timeout=30, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:
        player = Player(launcher, client, random.Random())
        day = 1
        while True:
            await player.play_day(day)
            day += 1


class Player:
    """Plays the students, the incidents, and the administrator of the accounts in CSP."""

    def __init__(self, launcher: Launcher, client: httpx.AsyncClient, chance: random.Random) -> None:
        settings = launcher.settings
        self._terminal = launcher.terminal
        self._amqp_url = launcher.amqp_url
        self._client = client
        self._chance = chance
        self._gateway = settings.gateway_url
        self._control = f"{settings.simulator_url}/_control"
        self._track_token = settings.tokens["BROKER_API_TOKEN"].split(",")[0].strip()
        self._admin_token = admin_token(settings)
        self._started_at = 0.0
        self._served = 0
        self._unserved = 0
        self._waits_min: list[float] = []
        """Waits in line, in minutes of the day."""

    async def play_day(self, number: int) -> None:
        self._started_at = time.monotonic()
        self._served = self._unserved = 0
        self._waits_min.clear()
        self._print(DAY_START_MIN, f"day {number} begins")
        await self._control_csp("PATCH", "behaviour", {"create_latency_sec": _CREATION_SEC})
        await self._apply_policy()
        await self.add_accounts()
        async with asyncio.TaskGroup() as tasks:
            for student in class_day.generate_students(number, self._chance):
                tasks.create_task(self._attend(student))
            for lesson in class_day.LESSONS:
                tasks.create_task(self._announce(lesson))
                if lesson.name_prefix is not None:
                    tasks.create_task(self._report_line(lesson))
            for incident in class_day.INCIDENTS:
                tasks.create_task(self._play_incident(incident))
            tasks.create_task(self._print_summary())

    async def add_accounts(self) -> None:
        """Create accounts in CSP until the pool has ACCOUNTS available sandboxes."""
        counts = await pool.fetch_counts(self._gateway, self._admin_token)
        if counts is not None and counts["available"] < ACCOUNTS:
            await self._control_csp("POST", "accounts", {"count": ACCOUNTS - counts["available"]})

    async def fail_for_15_minutes(self) -> None:
        await self._control_csp("PUT", "script", {"name": "bad-day", "speed": SPEED})

    async def send_unreadable_message(self) -> None:
        async with open_connection(self._amqp_url) as connection, connection.channel() as channel:
            message = Message(b'{"kind": "of an older version"}', content_type="application/json")
            await channel.default_exchange.publish(message, "allocator.maintenance")

    async def list_half(self) -> None:
        await self._control_csp("PATCH", "behaviour", {"listing_fraction": 0.5})

    async def list_all(self) -> None:
        await self._control_csp("PATCH", "behaviour", {"listing_fraction": 1.0})

    async def refuse_token(self) -> None:
        await self._control_csp("PATCH", "behaviour", {"reject_tokens": True})

    async def accept_token(self) -> None:
        await self._control_csp("PATCH", "behaviour", {"reject_tokens": False})

    async def use_revoked_token(self) -> None:
        for _ in range(_REVOKED_TOKEN_REQUESTS):
            await self._post("allocate", "student-of-an-old-track", token="revoked-token")

    async def _announce(self, lesson: Lesson) -> None:
        await self._sleep_until(lesson.at_min)
        self._print(lesson.at_min, f"{lesson.students} students start {lesson.track}")

    async def _report_line(self, lesson: Lesson) -> None:
        """Print when the last student of the class has a sandbox."""
        await self._sleep_until(lesson.at_min + class_day.ARRIVAL_MIN)
        while self._served + self._unserved < lesson.students:  # noqa: ASYNC110 (the first class of the day)
            await asyncio.sleep(_MINUTE_SEC)
        longest_min = max(self._waits_min, default=0)
        self._print(
            self._minute(),
            f"{self._served} students of {lesson.track} have a sandbox; {len(self._waits_min)} waited in line, "
            f"the longest for {longest_min:.0f} minutes",
        )

    async def _play_incident(self, incident: Incident) -> None:
        await self._sleep_until(incident.at_min)
        self._print(incident.at_min, incident.text)
        play: Callable[[], Awaitable[None]] = getattr(self, incident.method)
        try:
            await play()
        except (httpx.HTTPError, OSError, AMQPError) as error:
            self._terminal.print_error(f"The demo skipped an incident: {type(error).__name__} {error}")

    async def _attend(self, student: Student) -> None:
        await self._sleep_until(student.at_min)
        lease = await self._allocate(student)
        if lease is None:
            self._unserved += 1
            return
        self._served += 1
        if student.repeats_allocation:
            await self._post("allocate", student.name, track=student.track)
        await asyncio.sleep(student.stay_min * _MINUTE_SEC)
        if student.releases:
            await self._post(f"sandboxes/{lease['sandbox_id']}/mark-for-deletion", student.name)

    async def _allocate(self, student: Student) -> dict[str, Any] | None:
        began_at = time.monotonic()
        deadline = began_at + _PATIENCE_MIN * _MINUTE_SEC
        headers = (
            {}
            if student.name_prefix is None
            else {
                "X-Sandbox-Name-Prefix": student.name_prefix,
                "Prefer": "respond-async, wait=900",
            }
        )
        is_waiting = False
        while time.monotonic() < deadline:
            response = await self._post("allocate", student.name, track=student.track, headers=headers)
            if response is not None and response.status_code in (200, 201):
                if is_waiting:
                    self._waits_min.append((time.monotonic() - began_at) / _MINUTE_SEC)
                lease: dict[str, Any] = response.json()
                return lease
            is_waiting |= response is not None and response.status_code == 202
            await asyncio.sleep(_ASK_AGAIN_SEC)
        return None

    async def _apply_policy(self) -> None:
        try:
            response = await self._client.put(
                f"{self._gateway}/v1/admin/policies",
                headers={"Authorization": f"Bearer {self._admin_token}"},
                json={"policies": [STOCK_POLICY]},
            )
            response.raise_for_status()
        except httpx.HTTPError as error:
            self._terminal.print_error(f"The demo has no stock today: {type(error).__name__} {error}")

    async def _post(
        self,
        path: str,
        name: str,
        *,
        track: str | None = None,
        token: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response | None:
        headers = {
            "Authorization": f"Bearer {token or self._track_token}",
            "X-Instruqt-Sandbox-ID": name,
            **({"X-Instruqt-Track-ID": track} if track else {}),
            **(headers or {}),
        }
        try:
            return await self._client.post(f"{self._gateway}/v1/{path}", headers=headers)
        except httpx.TransportError:
            return None

    async def _control_csp(self, method: str, path: str, body: Any) -> None:
        (await self._client.request(method, f"{self._control}/{path}", json=body)).raise_for_status()

    def _minute(self) -> float:
        """Return the time of the day, in minutes since midnight."""
        return DAY_START_MIN + (time.monotonic() - self._started_at) / _MINUTE_SEC

    async def _sleep_until(self, minute: float) -> None:
        await asyncio.sleep(self._started_at + (minute - DAY_START_MIN) * _MINUTE_SEC - time.monotonic())

    async def _print_summary(self) -> None:
        await self._sleep_until(DAY_END_MIN)
        self._print(DAY_END_MIN, f"{self._served} students got a sandbox, {self._unserved} got none")

    def _print(self, minute: float, text: str) -> None:
        self._terminal.print_log_line("class day", f"{format_time(minute)}  {text}")


async def _monitoring_lines(settings: Settings, stack: AsyncExitStack, terminal: Terminal) -> list[str]:
    """Start Prometheus if it is installed. Return lines with the addresses of Prometheus and Grafana."""
    day_sec = (DAY_END_MIN - DAY_START_MIN) * _MINUTE_SEC
    lines = [f"Class days run at {SPEED} times their speed, {day_sec / 60:.0f} minutes each, until Ctrl-C."]
    port = int(settings.environment.get("PROMETHEUS_PORT") or PROMETHEUS_PORT)
    services = {name: settings.ports[variable] for name, (_, variable) in SERVICES.items()}
    if not prometheus.is_installed():
        return [*lines, "  Prometheus     not installed; run `apt install prometheus`, then `make demo` again", ""]
    if not ports.is_free(port):
        raise CannotRun(f"port {port} is in use by another program; set PROMETHEUS_PORT to a free port")
    running = await stack.enter_async_context(
        prometheus.start_prometheus(
            services,
            settings.state_directory / "prometheus",
            port,
            terminal,
            scrape_interval_sec=SCRAPE_SEC,
            evaluation_interval_sec=SCRAPE_SEC,
        )
    )
    lines += [f"  Prometheus     {running.url}/graph", f"  alerts         {running.url}/alerts"]
    if await docker.unavailable_reason() is None:
        grafana = settings.root / "deploy" / "grafana"
        lines += [
            "  Grafana        http://127.0.0.1:3000/dashboards (admin, admin), started by this command:",
            "",
            "  docker run --rm --network host --add-host prometheus:127.0.0.1 \\"
            f"    -v {grafana}/datasources:/etc/grafana/provisioning/datasources:ro \\"
            f"    -v {grafana}/dashboards:/etc/grafana/provisioning/dashboards:ro grafana/grafana:12.2.0",
        ]
    else:
        lines.append("  Grafana        needs Docker, which is not available; the dashboards are in deploy/grafana")
    return [*lines, ""]


if __name__ == "__main__":
    raise SystemExit(main())
