"""Links that are black-holed, reset or slowed down."""

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from tests.chaos.faults import Fault, NotReached
from tests.chaos.killing import active_allocator
from tests.chaos.proxy import Proxy
from tests.chaos.stack import SERVICES, Chaos
from tests.integration.stack import eventually

SLOW_SEC = 0.3
CARRIES_WITHIN_SEC = 30.0
"""A slow link has slowed something down; what a reaper has to do may be held up by the fault beside it."""
DISTURBANCES: tuple[tuple[str, Callable[[Proxy], None], float], ...] = (
    ("black-holed", Proxy.swallow, 12.0),  # RabbitMQ notices within 10
    ("reset", Proxy.reset, 2.0),
    ("slowed down", partial(Proxy.slow_down, delay_sec=SLOW_SEC), 6.0),
)

Names = Callable[[Chaos], Awaitable[Sequence[str]]]


def of(who: str, names: Names, server: str, how: str, act: Callable[[Proxy], None], lasts_sec: float) -> Fault:
    """A fault of the links of some processes of one module to a server."""
    disturbed: list[tuple[Proxy, int]] = []

    async def inject(chaos: Chaos) -> None:
        links = [chaos.links[f"{name} to {server}"] for name in await names(chaos)]
        disturbed.extend((link, link.carried) for link in links)
        for link in links:
            act(link)

    async def heal(chaos: Chaos) -> None:
        try:
            if all(link.state == "slow" for link, _ in disturbed):
                await eventually(has_carried, within_sec=CARRIES_WITHIN_SEC)
        except AssertionError:
            raise NotReached("it carried nothing") from None
        finally:
            for link, _ in disturbed:
                link.heal()
            disturbed.clear()

    async def has_carried() -> bool:
        return any(link.carried > before for link, before in disturbed)

    module = who.rpartition(" ")[2].removesuffix("s")
    link = f"{module} to {server}"
    name = f"{who} to {server} {how}"
    return Fault(
        kind=f"{link} {how}",
        name=name,
        touches=frozenset({f"link from {link}"}),
        inject=inject,
        heal=heal,
        lasts_sec=lasts_sec,
    )


def processes(*names: str) -> Names:
    async def these(_: Chaos) -> Sequence[str]:
        return names

    return these


async def active(chaos: Chaos) -> Sequence[str]:
    return [await active_allocator(chaos)]


async def standby(chaos: Chaos) -> Sequence[str]:
    at_work = await active_allocator(chaos)
    return [name for name, module in SERVICES.items() if module == "allocator" and name != at_work]


def faults() -> list[Fault]:
    links = (
        ("gateway", processes("gateway"), "RabbitMQ"),
        ("both gateways", processes("gateway", "second gateway"), "RabbitMQ"),
        ("active allocator", active, "RabbitMQ"),
        ("standby allocator", standby, "RabbitMQ"),
        ("active allocator", active, "PostgreSQL"),
        ("standby allocator", standby, "PostgreSQL"),
        ("both reapers", processes("reaper", "second reaper"), "CSP"),
    )
    return [of(*link, *disturbance) for link in links for disturbance in DISTURBANCES]
