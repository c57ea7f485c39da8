"""Services whose clock is an hour wrong, and is set right again while they run.

PostgreSQL and RabbitMQ share the right one: a lease ends by PostgreSQL's clock, and so does this test's idea of it.
"""

from devstack import faketime
from tests.chaos.faults import Fault
from tests.chaos.stack import SERVICES, Chaos

HOUR_SEC = 3600
WRONG_SEC = 5.0
"""They look at the clock's file once a second."""


def wrong_clock(module: str, wrong_by_sec: int) -> Fault:
    async def inject(chaos: Chaos) -> None:
        _tell(chaos, module, wrong_by_sec)

    async def heal(chaos: Chaos) -> None:
        _tell(chaos, module, 0)

    how = "an hour ahead" if wrong_by_sec > 0 else "an hour behind"
    return Fault(
        kind=f"clock {how}",
        name=f"clock of each {module} {how}",
        touches=frozenset({"clock"}),
        inject=inject,
        heal=heal,
        lasts_sec=WRONG_SEC,
        served_within_sec=3,
    )


def _tell(chaos: Chaos, module: str, wrong_by_sec: int) -> None:
    for name, of in SERVICES.items():
        if of == module:
            faketime.set_offset(chaos.clock(name), wrong_by_sec)


def faults() -> list[Fault]:
    return [wrong_clock(module, by) for module in dict.fromkeys(SERVICES.values()) for by in (HOUR_SEC, -HOUR_SEC)]
