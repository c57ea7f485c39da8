"""Start everything in order, tell where it is, watch it, and stop it in order."""

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
from devstack.errors import CannotRun
from devstack.output import Terminal
from devstack.processes import Process, ProcessDied, run_unless_process_dies, spawn
from devstack.settings import Settings

SERVICES = {
    "gateway": ("gateway", "GATEWAY_PORT"),
    "allocator": ("allocator", "ALLOCATOR_PORT"),
    "reaper": ("reaper", "REAPER_PORT"),
    "csp-syncer": ("csp_syncer", "CSP_SYNCER_PORT"),
}
"""Name, module, and the variable of its port."""

ACCOUNTS = 50
_MIGRATE_SEC = 120.0

FollowUp = Callable[["Launcher", AsyncExitStack], Coroutine[Any, Any, None]]
"""What is done once everything runs, for as long as it takes."""


def main(root: Path = environment.ROOT) -> int:
    return run_stack("make run", lambda: environment.load(root=root))


def run_stack(
    name: str, load: Callable[[], Settings], *, follow_up: FollowUp | None = None, accounts: int = ACCOUNTS
) -> int:
    """The exit status: 0 stopped by its user, 1 something failed, 2 something has to be set or installed."""
    # Tries that find nobody are ours to report, not the client library's.
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
        # Signals cancel the work, never the stack that takes everything down again.
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
    terminal.print_line("Everything that was started has stopped.")
    return 0


async def _run_until_lost(
    settings: Settings, terminal: Terminal, stack: AsyncExitStack, follow_up: FollowUp | None, accounts: int
) -> None:
    began = time.monotonic()
    _check_ports(settings)
    settings.state_directory.mkdir(parents=True, exist_ok=True)
    stack.enter_context(_exclusive_run(settings))
    local_tokens.write_brokerctl_file(settings)
    found_database, found_broker = await infrastructure.find_servers(settings, terminal, stack)
    await infrastructure.claim_vhost(found_broker, terminal)
    dependencies_ready = time.monotonic()
    started = [*found_database.processes, *found_broker.processes]
    database_url = await run_unless_process_dies(database.prepare_database(settings, found_database), started)
    launcher = Launcher(settings, database_url, found_broker.url, terminal)

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
    for line in summary.summary_lines(settings, counts, seconds=now - began, set_up=dependencies_ready - began):
        terminal.print_line(line)
    await run_unless_process_dies(
        _wait_until_lost(terminal, None if follow_up is None else follow_up(launcher, stack)), started
    )


async def _wait_until_lost(terminal: Terminal, work: Coroutine[Any, Any, None] | None) -> None:
    """Until the terminal is gone; raises what `work` raises meanwhile."""
    tasks = [asyncio.create_task(terminal.lost.wait()), *([asyncio.create_task(work)] if work else [])]
    try:
        for ended in (await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED))[0]:
            ended.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Launcher:
    """Starts our own programs, each with the settings of this run."""

    settings: Settings
    database_url: str
    amqp_url: str
    terminal: Terminal

    async def migrate(self) -> None:
        """Raises CannotRun when the database could not be brought up to date."""
        code, output = await processes.run(
            [sys.executable, "-m", "sandbox_broker.migrate"],
            env=self._environment(),
            cwd=self.settings.root,
            timeout=_MIGRATE_SEC,
            on_line=lambda line: self.terminal.print_log_line("migrate", line),
        )
        if code != 0:
            reason = output.splitlines()[-1] if output else f"exit code {code}"
            raise CannotRun(f"the database could not be migrated: {reason}", status=1)

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
            on_line=lambda line: self.terminal.print_log_line(name, line),
        )

    def _environment(self) -> dict[str, str]:
        return {
            **self.settings.environment,
            **self.settings.tokens,
            **{name: str(port) for name, port in self.settings.ports.items()},
            "DATABASE_URL": self.database_url,
            "AMQP_URL": self.amqp_url,
            "CSP_BASE_URL": self.settings.csp_base_url or f"{self.settings.simulator_url}/v2",
            # On one machine the gateway's port is enough. An OPS_PORT in .env is for containers.
            "OPS_PORT": "",
        }


class Interruption:
    """Ctrl-C and SIGTERM: the first one stops everything in order, a further Ctrl-C ends it at once."""

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
            self._terminal.print_line("Stopping. Ctrl-C once more ends everything at once.")
            self._work.cancel()
        elif number is signal.SIGINT:
            # Only the keyboard: `make` and whoever ended it may both hand on the same SIGTERM.
            processes.kill_all()


@contextmanager
def _exclusive_run(settings: Settings) -> Iterator[None]:
    """Holds a lock on the accounts file, which two simulators would overwrite for each other."""
    path = Path(f"{database.accounts_file(settings)}.lock")
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CannotRun(
                "`make run` is running in this clone already; another one needs a DATABASE_URL of its own"
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
            raise CannotRun(f"port {port} is taken by another program; set {name} to a free one")
        wanted[port] = name


def _ready_urls(settings: Settings) -> dict[str, str]:
    urls = {name: f"http://127.0.0.1:{settings.ports[variable]}/readyz" for name, (_, variable) in SERVICES.items()}
    if settings.csp_base_url is None:
        urls["csp-simulator"] = f"{settings.simulator_url}/healthz"
    return urls


def admin_token(settings: Settings) -> str:
    """The first of those that may be listed."""
    return settings.tokens["BROKER_ADMIN_TOKEN"].split(",")[0].strip()


def _print_death(process: Process, terminal: Terminal) -> None:
    terminal.print_line()
    terminal.print_error(f"{process.name} {process.ending}. Its last lines:")
    for line in list(process.tail)[-10:]:
        terminal.print_line(f"    {line}")
    terminal.print_error("Stopping the rest.")
