"""Network links black-holed, reset or slowed down."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from devstack.conditions import wait_until
from tests.chaos.faults import Fault, FaultNotReached
from tests.chaos.process_faults import find_active_allocator
from tests.chaos.proxy import Proxy
from tests.chaos.stack import SERVICES, ChaosBroker

SLOW_SEC = 0.3
CARRIES_WITHIN_SEC = 30.0
"""Time for a slow link to carry data. It is long, because a concurrent fault may hold up the work of a reaper."""
DISTURBANCES: tuple[tuple[str, Callable[[Proxy], None], float], ...] = (
    ("black-holed", Proxy.black_hole, 12.0),  # RabbitMQ notices within 10 s
    ("reset", Proxy.reset, 2.0),
    ("slowed down", partial(Proxy.slow_down, delay_sec=SLOW_SEC), 6.0),
)

SelectProcesses = Callable[[ChaosBroker], Awaitable[Sequence[str]]]


def build_link_fault(
    clients: str,
    select: SelectProcesses,
    server: str,
    disturbance: str,
    disturb: Callable[[Proxy], None],
    duration_sec: float,
) -> Fault:
    """Build a fault of the links from the selected processes, all of one module, to a server."""
    disturbed: list[tuple[Proxy, int]] = []

    async def inject(broker: ChaosBroker) -> None:
        links = [link for name in await select(broker) for link in broker.links[f"{name} to {server}"]]
        disturbed.extend((link, link.bytes_carried) for link in links)
        for link in links:
            disturb(link)

    async def heal(broker: ChaosBroker) -> None:
        try:
            if all(link.state == "slow" for link, _ in disturbed):
                await wait_until(has_carried, within_sec=CARRIES_WITHIN_SEC)
        except AssertionError:
            raise FaultNotReached("the link carried no data") from None
        finally:
            for link, _ in disturbed:
                link.heal()
            disturbed.clear()

    async def has_carried() -> bool:
        return any(link.bytes_carried > before for link, before in disturbed)

    module = clients.rpartition(" ")[2].removesuffix("s")
    link = f"{module} to {server}"
    return Fault(
        kind=f"{link} {disturbance}",
        name=f"{clients} to {server} {disturbance}",
        affects=frozenset({f"link from {link}"}),
        inject=inject,
        heal=heal,
        duration_sec=duration_sec,
    )


def select_processes(*names: str) -> SelectProcesses:
    async def select(_: ChaosBroker) -> Sequence[str]:
        return names

    return select


async def select_active_allocator(broker: ChaosBroker) -> Sequence[str]:
    return [await find_active_allocator(broker)]


async def select_standby_allocator(broker: ChaosBroker) -> Sequence[str]:
    active = await find_active_allocator(broker)
    return [name for name, module in SERVICES.items() if module == "allocator" and name != active]


def list_faults() -> list[Fault]:
    links = (
        ("gateway", select_processes("gateway"), "RabbitMQ"),
        ("both gateways", select_processes("gateway", "second gateway"), "RabbitMQ"),
        ("active allocator", select_active_allocator, "RabbitMQ"),
        ("standby allocator", select_standby_allocator, "RabbitMQ"),
        ("active allocator", select_active_allocator, "PostgreSQL"),
        ("standby allocator", select_standby_allocator, "PostgreSQL"),
        ("both reapers", select_processes("reaper", "second reaper"), "CSP"),
    )
    return [build_link_fault(*link, *disturbance) for link in links for disturbance in DISTURBANCES]
