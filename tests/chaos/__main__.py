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
from collections.abc import Iterator
from pathlib import Path

from devstack.errors import CannotRun
from devstack.output import Terminal
from tests.chaos import checker, faults, report, rounds
from tests.chaos.faults import Fault
from tests.chaos.stack import chaos


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seed", default=secrets.token_hex(4), help="of a round to be repeated")
    parser.add_argument("--minutes", type=float, default=3, help="of faults; the last one is not cut short")
    parser.add_argument("--only", default="", metavar="WORDS", help="parts of names, comma-separated")
    arguments = parser.parse_args()
    # Tries that find nobody are ours to report, not the client library's.
    logging.getLogger("aio_pika").setLevel(logging.CRITICAL)
    logging.getLogger("aiormq").setLevel(logging.CRITICAL)
    try:
        return asyncio.run(_run(arguments, Terminal()))
    except CannotRun as reason:
        sys.stderr.write(f"python -m tests.chaos: {reason}\n")
        return reason.status


async def _run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    if not any(_chosen(fault, arguments.only) for fault in faults.schedule(random.Random(arguments.seed))):
        raise CannotRun(f"no fault has any of {arguments.only!r} in its name")
    directory = Path(tempfile.mkdtemp(prefix="sandbox-broker-chaos-"))
    terminal.say(f"SEED={arguments.seed}; logs in {directory}")
    async with chaos(directory) as broker:
        terminal.note("PostgreSQL, RabbitMQ, all services twice: ready")
        planned = _planned(arguments.seed, arguments.only, 60 * arguments.minutes)
        round_ = await rounds.run(broker, planned, arguments.seed, terminal.note)
    for line in report.tables(round_):
        terminal.say(line)
    violations = checker.check(round_.evidence)
    for violation in violations:
        terminal.complain(violation)
    if violations:
        terminal.say(f"{len(violations)} violations; the logs are in {directory}")
        return 1
    shutil.rmtree(directory)
    terminal.say("no violations")
    return 0


def _planned(seed: str, words: str, seconds: float) -> Iterator[Fault]:
    """Every fault once, then again in another order, until so much time has passed since the first."""
    chance = random.Random(seed)
    until = time.monotonic() + seconds
    while True:
        for fault in faults.schedule(chance):
            if _chosen(fault, words):
                if time.monotonic() > until:
                    return
                yield fault


def _chosen(fault: Fault, words: str) -> bool:
    return any(word in fault.name for word in words.split(","))


if __name__ == "__main__":
    sys.exit(main())
