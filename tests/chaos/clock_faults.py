"""Clocks of services set an hour wrong for some seconds.

PostgreSQL and RabbitMQ keep the right clock, because leases end by PostgreSQL's clock, and the checker
compares it with the clock of the clients.
"""

from devstack import faketime
from tests.chaos.faults import Fault
from tests.chaos.stack import SERVICES, ChaosBroker

HOUR_SEC = 3600
DURATION_SEC = 5.0
"""Several seconds, because libfaketime reads its file once a second."""


def build_clock_fault(module: str, offset_sec: int) -> Fault:
    async def inject(broker: ChaosBroker) -> None:
        _set_clock_offset(broker, module, offset_sec)

    async def heal(broker: ChaosBroker) -> None:
        _set_clock_offset(broker, module, 0)

    direction = "an hour ahead" if offset_sec > 0 else "an hour behind"
    return Fault(
        kind=f"clock {direction}",
        name=f"clock of each {module} {direction}",
        affects=frozenset({"clock"}),
        inject=inject,
        heal=heal,
        duration_sec=DURATION_SEC,
        served_within_sec=3,
    )


def _set_clock_offset(broker: ChaosBroker, module: str, offset_sec: int) -> None:
    for name, process_module in SERVICES.items():
        if process_module == module:
            faketime.set_offset(broker.clock_file(name), offset_sec)


def list_faults() -> list[Fault]:
    return [
        build_clock_fault(module, offset_sec)
        for module in dict.fromkeys(SERVICES.values())
        for offset_sec in (HOUR_SEC, -HOUR_SEC)
    ]
