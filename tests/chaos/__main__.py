"""`python -m tests.chaos`: a round of faults, and what the checker says of it.

The exit status is 0 if the broker has kept its promises, 1 if not, 2 when something has to be installed first.
The logs of a round that failed are kept.
"""

import argparse
import asyncio
import logging
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from devstack import faketime
from devstack.errors import CannotRun
from devstack.output import Terminal
from tests.chaos import checker, matrix, report, rounds
from tests.chaos.matrix import Step
from tests.chaos.stack import chaos


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", default=secrets.token_hex(4), help="of a round to be repeated")
    parser.add_argument(
        "--minutes",
        type=float,
        help="so long: every fault alone, then pairs; without it, one fault of each kind",
    )
    parser.add_argument("--only", default="", metavar="WORDS", help="parts of names, comma-separated")
    parser.add_argument("--every", type=float, default=0, metavar="SECONDS", help="from one fault to the next")
    parser.add_argument("--keep", action="store_true", help="the logs, whatever comes of the round")
    arguments = parser.parse_args()
    for library in ("aio_pika", "aiormq", "asyncpg"):  # tries that find nobody are ours to report
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        return asyncio.run(_run(arguments, Terminal()))
    except CannotRun as reason:
        sys.stderr.write(f"python -m tests.chaos: {reason}\n")
        return reason.status


async def _run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    if not matrix.short(random.Random(arguments.seed), arguments.only):
        raise CannotRun(f"no fault has any of {arguments.only!r} in its name")
    clocks = await faketime.find_library(terminal)
    directory = Path(tempfile.mkdtemp(prefix="sandbox-broker-chaos-"))
    terminal.print_line(f"SEED={arguments.seed}; logs in {directory}")
    async with chaos(directory, clocks) as broker:
        terminal.print_step("PostgreSQL, RabbitMQ, all services twice: ready")
        steps = _steps(arguments.seed, arguments.only, arguments.minutes)
        round_ = await rounds.run(broker, steps, arguments.seed, terminal.print_step, every_sec=arguments.every)
    report.keep(round_, directory)
    for line in report.tables(round_):
        terminal.print_line(line)
    violations = checker.check(round_.evidence)
    violations += [report.told(script) for script in report.failed(round_)]
    for violation in violations:
        terminal.print_error(violation)
    if violations:
        terminal.print_line(
            f"{len(violations)} violations; SEED={arguments.seed} repeats the round; logs in {directory}"
        )
        return 1
    if not arguments.keep:
        shutil.rmtree(directory)
    terminal.print_line("no violations")
    return 0


def _steps(seed: str, words: str, minutes: float | None) -> Iterable[Step]:
    chance = random.Random(seed)
    if minutes is None:
        return matrix.short(chance, words)
    return _for(60 * minutes, matrix.long(chance, words))


def _for(seconds: float, steps: Iterable[Step]) -> Iterator[Step]:
    """The last one is not cut short."""
    until = time.monotonic() + seconds
    for step in steps:
        if time.monotonic() > until:
            return
        yield step


if __name__ == "__main__":
    sys.exit(main())
