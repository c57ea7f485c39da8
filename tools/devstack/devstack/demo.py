"""`make demo`: `make run`, with class days at a hundred times their speed: something to look at."""

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
from devstack.class_day import BEGINS_MIN, ENDS_MIN, Incident, Lesson, Student, clock
from devstack.errors import CannotRun
from devstack.main import SERVICES, Launcher, admin_token, run
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
"""How long a student whom nobody serves keeps trying; the script for a track gives up after two minutes."""
_OLD_TOKEN_TRIES = 40

# Every duration of the services is as much shorter as the day is.
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
}


def main(root: Path = environment.ROOT) -> int:
    return run("make demo", lambda: load(root=root), then=play, accounts=ACCOUNTS)


def load(environ: Mapping[str, str] | None = None, root: Path = environment.ROOT) -> Settings:
    settings = environment.load(environ, root, defaults=DEFAULTS, demo=True)
    if settings.csp_base_url is not None:
        raise CannotRun("the demo is played on the CSP simulator; unset CSP_BASE_URL")
    return settings


async def play(launcher: Launcher, stack: AsyncExitStack) -> None:
    """One day after the other, for ever."""
    settings, terminal = launcher.settings, launcher.terminal
    for line in await _where_to_look(settings, stack, terminal):
        terminal.say(line)
    async with httpx.AsyncClient(timeout=30, trust_env=False, limits=httpx.Limits(max_connections=None)) as client:
        player = Player(launcher, client, random.Random())
        day = 1
        while True:
            await player.day(day)
            day += 1


class Player:
    """The students, CSP's moods, and whoever fills the pool overnight."""

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
        self._began = 0.0
        self._served = 0
        self._turned_away = 0

    async def day(self, number: int) -> None:
        self._began = time.monotonic()
        self._served = self._turned_away = 0
        self._tell(BEGINS_MIN, f"day {number} begins")
        await self.supply()
        async with asyncio.TaskGroup() as tasks:
            for student in class_day.students(number, self._chance):
                tasks.create_task(self._attend(student))
            for lesson in class_day.LESSONS:
                tasks.create_task(self._announce(lesson))
            for incident in class_day.INCIDENTS:
                tasks.create_task(self._let_happen(incident))
            tasks.create_task(self._sum_up())

    async def supply(self) -> None:
        """As many accounts in CSP as the pool lacks."""
        counts = await pool.stats(self._gateway, self._admin_token)
        if counts is not None and counts["available"] < ACCOUNTS:
            await self._csp("POST", "accounts", {"count": ACCOUNTS - counts["available"]})

    async def fail_for_a_quarter(self) -> None:
        await self._csp("PUT", "script", {"name": "bad-day", "speed": SPEED})

    async def send_nonsense(self) -> None:
        async with open_connection(self._amqp_url) as connection, connection.channel() as channel:
            message = Message(b'{"kind": "of an older version"}', content_type="application/json")
            await channel.default_exchange.publish(message, "allocator.maintenance")

    async def list_half(self) -> None:
        await self._csp("PATCH", "behaviour", {"listing_fraction": 0.5})

    async def list_all(self) -> None:
        await self._csp("PATCH", "behaviour", {"listing_fraction": 1.0})

    async def refuse_token(self) -> None:
        await self._csp("PATCH", "behaviour", {"reject_tokens": True})

    async def take_token(self) -> None:
        await self._csp("PATCH", "behaviour", {"reject_tokens": False})

    async def use_old_token(self) -> None:
        for _ in range(_OLD_TOKEN_TRIES):
            await self._ask("allocate", "somebody", token="taken-back")

    async def _announce(self, lesson: Lesson) -> None:
        await self._until(lesson.at_min)
        self._tell(lesson.at_min, f"{lesson.students} students come to {lesson.track}")

    async def _let_happen(self, incident: Incident) -> None:
        await self._until(incident.at_min)
        self._tell(incident.at_min, incident.told)
        happens: Callable[[], Awaitable[None]] = getattr(self, incident.what)
        try:
            await happens()
        except (httpx.HTTPError, OSError, AMQPError) as error:
            self._terminal.complain(f"The demo could not go on as planned: {type(error).__name__} {error}")

    async def _attend(self, student: Student) -> None:
        await self._until(student.at_min)
        lease = await self._allocate(student)
        if lease is None:
            self._turned_away += 1
            return
        self._served += 1
        if student.asks_again:
            await self._ask("allocate", student.name, track=student.track)
        await asyncio.sleep(student.stays_min * _MINUTE_SEC)
        if student.gives_back:
            await self._ask(f"sandboxes/{lease['sandbox_id']}/mark-for-deletion", student.name)

    async def _allocate(self, student: Student) -> dict[str, Any] | None:
        gives_up = time.monotonic() + _PATIENCE_MIN * _MINUTE_SEC
        while time.monotonic() < gives_up:
            response = await self._ask("allocate", student.name, track=student.track)
            if response is not None and response.is_success:
                lease: dict[str, Any] = response.json()
                return lease
            await asyncio.sleep(_ASK_AGAIN_SEC)
        return None

    async def _ask(
        self, path: str, name: str, *, track: str | None = None, token: str | None = None
    ) -> httpx.Response | None:
        headers = {
            "Authorization": f"Bearer {token or self._track_token}",
            "X-Instruqt-Sandbox-ID": name,
            **({"X-Instruqt-Track-ID": track} if track else {}),
        }
        try:
            return await self._client.post(f"{self._gateway}/v1/{path}", headers=headers)
        except httpx.TransportError:
            return None

    async def _csp(self, method: str, path: str, body: Any) -> None:
        (await self._client.request(method, f"{self._control}/{path}", json=body)).raise_for_status()

    async def _until(self, minute: float) -> None:
        await asyncio.sleep(self._began + (minute - BEGINS_MIN) * _MINUTE_SEC - time.monotonic())

    async def _sum_up(self) -> None:
        await self._until(ENDS_MIN)
        self._tell(ENDS_MIN, f"{self._served} students had a sandbox, {self._turned_away} had none")

    def _tell(self, minute: float, text: str) -> None:
        self._terminal.line("class day", f"{clock(minute)}  {text}")


async def _where_to_look(settings: Settings, stack: AsyncExitStack, terminal: Terminal) -> list[str]:
    """Starts Prometheus where it is installed."""
    day_sec = (ENDS_MIN - BEGINS_MIN) * _MINUTE_SEC
    said = [f"Class days go by at {SPEED} times their speed, {day_sec / 60:.0f} minutes each, until Ctrl-C."]
    port = int(settings.environment.get("PROMETHEUS_PORT") or PROMETHEUS_PORT)
    services = {name: settings.ports[variable] for name, (_, variable) in SERVICES.items()}
    if not prometheus.installed():
        return [*said, "  Prometheus     is not installed: `apt install prometheus`, and again", ""]
    if not ports.is_free(port):
        raise CannotRun(f"port {port} is taken by another program; set PROMETHEUS_PORT to a free one")
    running = await stack.enter_async_context(
        prometheus.watching(
            services, settings.state_directory / "prometheus", port, terminal, interval_sec=SCRAPE_SEC
        )
    )
    said += [f"  Prometheus     {running.url}/graph", f"  alerts         {running.url}/alerts"]
    if await docker.refusal() is None:
        grafana = settings.root / "deploy" / "grafana"
        said += [
            "  Grafana        http://127.0.0.1:3000/dashboards (admin, admin), after this in another terminal:",
            "",
            "  docker run --rm --network host --add-host prometheus:127.0.0.1 \\"
            f"    -v {grafana}/datasources:/etc/grafana/provisioning/datasources:ro \\"
            f"    -v {grafana}/dashboards:/etc/grafana/provisioning/dashboards:ro grafana/grafana:12.2.0",
        ]
    else:
        said.append("  Grafana        needs Docker, which does not answer; deploy/grafana has the dashboards")
    return [*said, ""]


if __name__ == "__main__":
    raise SystemExit(main())
