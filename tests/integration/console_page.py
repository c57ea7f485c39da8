"""Console in a real browser, with a record of its errors."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from playwright.async_api import Browser, Page, Request, async_playwright, expect

from devstack import chromium
from devstack.errors import CannotRun
from devstack.output import Terminal

TIMEOUT_MS = 30_000
WATCH = """
document.addEventListener("securitypolicyviolation", violation =>
    console.error(`policy: ${violation.violatedDirective} ${violation.blockedURI}`))
"""


@dataclass
class Console:
    """Browser page that is signed in. `problems` are errors of scripts, of the policy and of requests."""

    page: Page
    url: str
    problems: list[str] = field(default_factory=list)

    async def open(self, path: str) -> None:
        await self.page.goto(f"{self.url}{path}")

    def note_request(self, request: Request) -> None:
        if not request.url.startswith((self.url, "data:")):
            self.problems.append(f"external: {request.url}")


@asynccontextmanager
async def launch_browser() -> AsyncIterator[Browser]:
    try:
        path = await chromium.find_chromium(Terminal())
    except CannotRun as reason:
        pytest.fail(f"this test needs a real browser: {reason}")
    expect.set_options(timeout=TIMEOUT_MS)
    async with async_playwright() as playwright:
        launched = await playwright.chromium.launch(
            executable_path=path, chromium_sandbox=os.geteuid() != 0, timeout=TIMEOUT_MS * 3
        )
        yield launched
        await launched.close()


@asynccontextmanager
async def open_console(browser: Browser, url: str, token: str) -> AsyncIterator[Console]:
    """Sign in with the token and show the Overview."""
    context = await browser.new_context(viewport={"width": 1440, "height": 900}, color_scheme="light")
    page = await context.new_page()
    page.set_default_timeout(TIMEOUT_MS)
    console = Console(page, url)
    page.on("console", lambda line: console.problems.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: console.problems.append(str(error)))
    page.on("dialog", lambda dialog: console.problems.append(f"dialog: {dialog.message}"))
    page.on("request", console.note_request)
    await page.add_init_script(WATCH)
    await console.open("/")
    await sign_in(page, token)
    await expect(page).to_have_title("Overview · Sandbox Broker")
    yield console
    await context.close()


async def sign_in(page: Page, token: str) -> None:
    await page.get_by_label("Token").fill(token)
    await page.get_by_role("button", name="Sign in with a token").click()
