"""Run the broker: start all processes in order, print a summary, supervise them, stop them in order."""

import asyncio
import fcntl
import logging
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devstack import database, infrastructure, local_tokens, pool, ports, processes, summary
from devstack import settings as environment
from devstack.cluster import start_cluster
from devstack.errors import CannotRun
from devstack.log_line import render_log_line
from devstack.output import Terminal
from devstack.processes import Process, ProcessDied, run_unless_process_dies, spawn
from devstack.settings import Settings

SERVICES = {
    "gateway": ("gateway", "GATEWAY_PORT"),
    "allocator": ("allocator", "ALLOCATOR_PORT"),
    "reaper": ("reaper", "REAPER_PORT"),
    "csp-syncer": ("csp_syncer", "CSP_SYNCER_PORT"),
    "provisioner": ("provisioner", "PROVISIONER_PORT"),
    "console": ("console", "CONSOLE_PORT"),
}
"""Service name -> module and variable of the port."""

ACCOUNTS = 50
_MIGRATE_SEC = 120.0

FollowUp = Callable[["Launcher", AsyncExitStack], Coroutine[Any, Any, None]]
"""Work that begins after the start and continues until the run stops."""


def main(root: Path = environment.ROOT) -> int:
    return run_stack("make run", lambda: environment.load(root=root))


def run_stack(
    name: str, load: Callable[[], Settings], *, follow_up: FollowUp | None = None, accounts: int = ACCOUNTS
) -> int:
    """Run until Ctrl-C.

    Return the exit status: 0 stopped by the user, 1 a component failed, 2 the user must set or install something.
    """
    # The probes of this package report failed connections, so the client library must not log them too.
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    terminal = Terminal()
    try:
        return asyncio.run(
            _run_until_stopped(local_tokens.add_generated_tokens(load()), terminal, follow_up, accounts)
        )
    except CannotRun as reason:
        sys.stdout.flush()
        print(f"{name}: {reason}", file=sys.stderr)
        return reason.status


async def _run_until_stopped(
    settings: Settings, terminal: Terminal, follow_up: FollowUp | None, accounts: int
) -> int:
    async with AsyncExitStack() as stack:
        work = asyncio.create_task(_run_until_lost(settings, terminal, stack, follow_up, accounts))
        interruption = Interruption(work, terminal)
        interruption.listen()
        # Signals cancel the work and never the stack, because the stack stops all processes.
        try:
            await work
        except asyncio.CancelledError:
            if not interruption.requested:
                raise
        except ProcessDied as death:
            _print_death(death.process, terminal)
            return 1
        finally:
            interruption.requested = True
    terminal.print_line("All processes have stopped.")
    return 0


async def _run_until_lost(
    settings: Settings, terminal: Terminal, stack: AsyncExitStack, follow_up: FollowUp | None, accounts: int
) -> None:
    started_at = time.monotonic()
    _check_ports(settings)
    settings.state_directory.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_exclusive_run(settings))
    local_tokens.write_brokerctl_file(settings)
    cluster = await start_cluster(terminal, stack) if settings.cluster else None
    if cluster is None:
        database_server, rabbitmq_server = await infrastructure.find_servers(settings, terminal, stack)
    else:
        database_server, rabbitmq_server = cluster.servers
    await infrastructure.claim_vhost(rabbitmq_server, terminal)
    dependencies_ready = time.monotonic()
    started = [*database_server.processes, *rabbitmq_server.processes]
    database_url = await run_unless_process_dies(database.prepare_database(settings, database_server), started)
    launcher = Launcher(settings, database_url, rabbitmq_server.url, terminal)

    if settings.csp_base_url is None:
        started.append(await launcher.start_simulator(accounts))
        stack.push_async_callback(processes.stop_all, started[-1:])
    await run_unless_process_dies(launcher.migrate(), started)
    services = [await launcher.start_service(name) for name in SERVICES]
    stack.push_async_callback(processes.stop_all, services)
    started += services
    await run_unless_process_dies(pool.wait_until_ready(_ready_urls(settings)), started)

    obstacle = await run_unless_process_dies(
        pool.fill_pool(settings.gateway_url, admin_token(settings), force=settings.csp_base_url is None), started
    )
    if obstacle is not None:
        terminal.print_error(f"The pool could not be filled: {obstacle}")
    counts = await pool.fetch_counts(settings.gateway_url, admin_token(settings))
    now = time.monotonic()
    for line in summary.summary_lines(
        settings, counts, seconds=now - started_at, set_up=dependencies_ready - started_at
    ):
        terminal.print_line(line)
    for line in () if cluster is None else cluster.summary_lines():
        terminal.print_line(line)
    work = [] if follow_up is None else [follow_up(launcher, stack)]
    work += [] if cluster is None else [cluster.replace_ended_nodes(terminal)]
    await run_unless_process_dies(_wait_until_lost(terminal, work), started)


async def _wait_until_lost(terminal: Terminal, work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Wait until the terminal is closed. Runs `work` meanwhile and raises its exceptions."""
    tasks = [asyncio.create_task(terminal.lost.wait()), *(asyncio.create_task(one) for one in work)]
    try:
        for ended in (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]:
            ended.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts the services, the simulator and the migration with the settings of this run."""

    settings: Settings
    database_url: str
    amqp_url: str
    terminal: Terminal

    async def migrate(self) -> None:
        """Migrate the database to the newest schema. Raises CannotRun if that fails."""
        code, output = await processes.run(
            [sys.executable, "-m", "sandbox_broker.migrate"],
            env=self._environment(),
            cwd=self.settings.root,
            timeout=_MIGRATE_SEC,
            on_line=lambda line: self._print_log("migrate", line),
        )
        if code != 0:
            reason = render_log_line(output.splitlines()[-1]) if output else f"exit code {code}"
            raise CannotRun(f"the migration of the database failed: {reason}", status=1)

    async def start_simulator(self, accounts: int) -> Process:
        port = self.settings.ports["CSP_SIMULATOR_PORT"]
        options = {
            "--host": "127.0.0.1",
            "--port": str(port),
            "--accounts": str(accounts),
            "--token": self.settings.tokens["CSP_API_TOKEN"],
            "--state": str(database.accounts_file(self.settings)),
        }
        arguments = [part for option in options.items() for part in option]
        return await self._start("csp-simulator", "csp_simulator", arguments)

    async def start_service(self, name: str) -> Process:
        module, _ = SERVICES[name]
        return await self._start(name, module)

    async def _start(self, name: str, module: str, arguments: Sequence[str] = ()) -> Process:
        return await spawn(
            name,
            [sys.executable, "-m", module, *arguments],
            env=self._environment(),
            cwd=self.settings.root,
            on_line=lambda line: self._print_log(name, line),
        )

    def _print_log(self, name: str, line: str) -> None:
        text = render_log_line(line) if self._renders_logs else line
        for part in text.split("\n"):
            self.terminal.print_log_line(name, part)

    @property
    def _renders_logs(self) -> bool:
        """Whether the services write JSON and this process its console text."""
        return self.settings.environment["LOG_FORMAT"].strip().lower() == "console"

    def _environment(self) -> dict[str, str]:
        return {
            **environment.login_settings(self.settings),
            **self.settings.environment,
            **self.settings.tokens,
            **{name: str(port) for name, port in self.settings.ports.items()},
            "DATABASE_URL": self.database_url,
            # For the console. brokerctl of this run has them from its file.
            "BROKER_API_URL": self.settings.gateway_url,
            "CONSOLE_URL": self.settings.console_url,
            "AMQP_URL": self.amqp_url,
            "CSP_BASE_URL": self.settings.csp_base_url or f"{self.settings.simulator_url}/v2",
            # One gateway port is enough on one machine. OPS_PORT in .env is for containers.
            "OPS_PORT": "",
            **({"LOG_FORMAT": "json"} if self._renders_logs else {}),
        }


class Interruption:
    """Signal handling: the first signal stops all processes in order, a second Ctrl-C kills them."""

    def __init__(self, work: "asyncio.Task[Any]", terminal: Terminal) -> None:
        self.requested = False
        self._work = work
        self._terminal = terminal

    def listen(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self.requested:
            self.requested = True
            self._terminal.print_line()
            self._terminal.print_line("Stopping. Press Ctrl-C again to kill all processes at once.")
            self._work.cancel()
        elif number is signal.SIGINT:
            # Only for Ctrl-C, because one SIGTERM can arrive twice: directly and passed on by `make`.
            processes.kill_all()


@contextmanager
def _exclusive_run(settings: Settings) -> Iterator[None]:
    """Hold a lock on the accounts file, because two simulators would overwrite each other's accounts."""
    path = Path(f"{database.accounts_file(settings)}.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CannotRun(
                "`make run` is already running in this clone; set DATABASE_URL to another database for a second run"
            ) from None
        yield


def _check_ports(settings: Settings) -> None:
    wanted: dict[int, str] = {}
    for name, port in settings.ports.items():
        if name == "CSP_SIMULATOR_PORT" and settings.csp_base_url is not None:
            continue
        if port in wanted:
            raise CannotRun(f"{wanted[port]} and {name} are both {port}; set one of them to another port")
        if not all(ports.is_free(port, host=host) for host in settings.bind_hosts):
            raise CannotRun(f"port {port} is in use by another program; set {name} to a free port")
        wanted[port] = name


def _ready_urls(settings: Settings) -> dict[str, str]:
    urls = {name: f"http://127.0.0.1:{settings.ports[variable]}/readyz" for name, (_, variable) in SERVICES.items()}
    if settings.csp_base_url is None:
        urls["csp-simulator"] = f"{settings.simulator_url}/healthz"
    return urls


def admin_token(settings: Settings) -> str:
    """Return the first admin token of the list."""
    return settings.tokens["BROKER_ADMIN_TOKEN"].split(",")[0].strip()


def _print_death(process: Process, terminal: Terminal) -> None:
    terminal.print_line()
    terminal.print_error(f"{process.name} {process.ending}. Its last lines:")
    for line in list(process.tail)[-10:]:
        for part in render_log_line(line).split("\n"):
            terminal.print_line(f"    {part}")
    terminal.print_error("Stopping the other processes.")
