"""Command line of the chaos test: `python -m tests.chaos` runs one round of faults and checks its evidence.

The exit status is 0 without violations, 1 with violations, 2 if a required program is missing. The logs of a failed
round are kept.
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
from devstack.rabbitmq_cluster import NET_TICKTIME_SEC
from tests.chaos import checker, matrix, report, rounds
from tests.chaos.matrix import Step
from tests.chaos.stack import start_broker


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", default=secrets.token_hex(4), help="seed of a round to repeat")
    parser.add_argument(
        "--minutes",
        type=float,
        help="duration: every fault alone, then pairs; default: one fault of each kind",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="WORDS",
        help="run only faults with one of these comma-separated words in the name",
    )
    parser.add_argument(
        "--every", type=float, default=0, metavar="SECONDS", help="shortest time from one fault to the next"
    )
    parser.add_argument("--times", type=int, help="run every fault alone, this number of times")
    parser.add_argument("--pairs", type=int, metavar="NUMBER", help="run this number of random pairs")
    parser.add_argument(
        "--cluster",
        action="store_true",
        help="run a RabbitMQ cluster and a PostgreSQL pair, with faults of their nodes",
    )
    parser.add_argument(
        "--net-ticktime",
        type=int,
        default=NET_TICKTIME_SEC,
        metavar="SECONDS",
        help="net_ticktime of the RabbitMQ nodes of --cluster",
    )
    parser.add_argument("--keep", action="store_true", help="keep the logs of a successful round too")
    arguments = parser.parse_args()
    for library in ("aio_pika", "aiormq", "asyncpg"):  # failed connection attempts are expected here
        logging.getLogger(library).setLevel(logging.CRITICAL)
    try:
        return asyncio.run(_run(arguments, Terminal()))
    except CannotRun as reason:
        sys.stderr.write(f"python -m tests.chaos: {reason}\n")
        return reason.status


async def _run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    if not matrix.plan_short_round(random.Random(arguments.seed), arguments.only, cluster=arguments.cluster):
        raise CannotRun(f"no fault has any of {arguments.only!r} in its name")
    libfaketime = await faketime.find_library(terminal)
    directory = Path(tempfile.mkdtemp(prefix="sandbox-broker-chaos-"))
    terminal.print_line(f"SEED={arguments.seed}; logs in {directory}")
    net_ticktime_sec = arguments.net_ticktime if arguments.cluster else None
    async with start_broker(directory, libfaketime, net_ticktime_sec=net_ticktime_sec) as broker:
        terminal.print_step("PostgreSQL, RabbitMQ and two of each service are ready")
        steps = _plan_steps(arguments)
        round_ = await rounds.run_round(
            broker, steps, arguments.seed, terminal.print_step, every_sec=arguments.every
        )
    report.save_records(round_, directory)
    for line in report.format_tables(round_):
        terminal.print_line(line)
    violations = checker.check(round_.evidence)
    violations += [report.describe_failed_run(run) for run in report.list_failed_runs(round_)]
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


def _plan_steps(arguments: argparse.Namespace) -> Iterable[Step]:
    rng, words, cluster = random.Random(arguments.seed), arguments.only, arguments.cluster
    if arguments.times is not None:
        return matrix.plan_repeated_round(rng, arguments.times, words, cluster=cluster)
    if arguments.pairs is not None:
        return matrix.plan_pairs(rng, arguments.pairs, words, cluster=cluster)
    if arguments.minutes is None:
        return matrix.plan_short_round(rng, words, cluster=cluster)
    return _limit_duration(60 * arguments.minutes, matrix.plan_long_round(rng, words, cluster=cluster))


def _limit_duration(seconds: float, steps: Iterable[Step]) -> Iterator[Step]:
    """Yield steps until the time is over. The last step is not interrupted."""
    until = time.monotonic() + seconds
    for step in steps:
        if time.monotonic() > until:
            return
        yield step


if __name__ == "__main__":
    sys.exit(main())
