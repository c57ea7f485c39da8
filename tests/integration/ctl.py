"""Run brokerctl as an operator or a script does."""

import asyncio
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.integration.stack import ADMIN_TOKEN, Stack, eventually

PATIENCE_SEC = 120.0


@dataclass(frozen=True)
class Said:
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


async def start(url: str, *arguments: str, **settings: str) -> asyncio.subprocess.Process:
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


async def eventually_said(
    stack: Stack, condition: Callable[[Said], object], *arguments: str, within_sec: float = PATIENCE_SEC
) -> Said:
    """Run `status` until the output meets the condition. On a busy machine a component may seem down at first."""
    said: Said | None = None

    async def is_met() -> bool:
        nonlocal said
        said = await ctl(stack, "status", *arguments)
        return bool(condition(said))

    await eventually(is_met, within_sec=within_sec)
    assert said is not None
    return said


async def ctl(stack: Stack, *arguments: str, url: str | None = None, **settings: str) -> Said:
    process = await start(url or f"{stack.url}/v1", *arguments, **settings)
    out, err = await process.communicate()
    assert process.returncode is not None
    assert "Traceback" not in err.decode()
    return Said(process.returncode, out.decode(), err.decode())
