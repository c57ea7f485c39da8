"""Run brokerctl as a subprocess."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from devstack.conditions import wait_until
from tests.integration.stack import ADMIN_TOKEN, Stack

PATIENCE_SEC = 120.0


@dataclass(frozen=True)
class CommandResult:
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        """Parse each output line as JSON."""
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        """Return the error of a failed command with --json."""
        detail: dict[str, Any] = json.loads(self.err)["error"]
        return detail


async def start_brokerctl(url: str, *arguments: str, **settings: str) -> asyncio.subprocess.Process:
    """Start brokerctl in an isolated environment, so that settings of the caller have no effect."""
    return await asyncio.create_subprocess_exec(
        Path(sys.executable).with_name("brokerctl"),
        *arguments,
        env={
            "PATH": os.environ["PATH"],
            "HOME": "/nonexistent",
            "COLUMNS": "200",
            "BROKER_API_URL": url,
            "BROKER_ADMIN_TOKEN": ADMIN_TOKEN,
            **settings,
        },
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def wait_for_status(
    stack: Stack, condition: Callable[[CommandResult], object], *arguments: str, within_sec: float = PATIENCE_SEC
) -> CommandResult:
    """Run `status` until the output meets the condition. On a busy machine a component can seem down at first."""
    result: CommandResult | None = None

    async def is_met() -> bool:
        nonlocal result
        result = await run_brokerctl(stack, "status", *arguments)
        return bool(condition(result))

    # Each try is a process, which takes ten times as long as the usual pause.
    try:
        await wait_until(is_met, within_sec=within_sec, every_sec=0.5)
    except AssertionError as error:
        raise AssertionError(f"{error}; the last result: {result}") from None
    assert result is not None
    return result


async def run_brokerctl(stack: Stack, *arguments: str, url: str | None = None, **settings: str) -> CommandResult:
    process = await start_brokerctl(url or f"{stack.url}/v1", *arguments, **settings)
    out, err = await process.communicate()
    assert process.returncode is not None
    assert "Traceback" not in err.decode()
    return CommandResult(process.returncode, out.decode(), err.decode())
