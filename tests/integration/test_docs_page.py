"""Docs page in a real browser, with the gateway's Content-Security-Policy and without external requests."""

import os
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Page, Route, async_playwright, expect

from devstack import chromium
from devstack.errors import CannotRun
from devstack.output import Terminal
from tests.integration.stack import TRACK_TOKEN, Stack

TIMEOUT_MS = 60_000

REPORT_POLICY_VIOLATIONS = """
document.addEventListener("securitypolicyviolation", violation =>
    console.error(`policy: ${violation.violatedDirective} ${violation.blockedURI}`))
"""


class ObservedPage:
    """Page with its errors and its external requests."""

    def __init__(self, page: Page, origin: str) -> None:
        self.page = page
        self.problems: list[str] = []
        self._origin = origin
        page.on("console", lambda message: self.problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: self.problems.append(str(error)))
        page.on("requestfailed", lambda request: self.problems.append(f"failed: {request.url}"))

    async def block_external_request(self, route: Route) -> None:
        if route.request.url.startswith((self._origin, "data:")):
            await route.continue_()
        else:
            self.problems.append(f"external: {route.request.url}")
            await route.abort()


@pytest.fixture(scope="module")
async def browser_path() -> str:
    try:
        return await chromium.find_chromium(Terminal())
    except CannotRun as reason:
        pytest.fail(f"this test needs a real browser: {reason}")


@pytest.fixture
async def docs(stack: Stack, browser_path: str) -> AsyncIterator[ObservedPage]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=browser_path, chromium_sandbox=os.geteuid() != 0, timeout=TIMEOUT_MS * 3
        )
        page = await browser.new_page()
        page.set_default_timeout(TIMEOUT_MS)
        observed = ObservedPage(page, stack.url)
        await page.add_init_script(REPORT_POLICY_VIOLATIONS)
        await page.route("**/*", observed.block_external_request)
        await page.goto(f"{stack.url}/v1/docs")
        yield observed
        await browser.close()


async def test_the_page_shows_every_route_without_external_requests(stack: Stack, docs: ObservedPage) -> None:
    document = (await stack.client.get(f"{stack.url}/v1/openapi.json")).json()
    routes = [(path, method.upper()) for path, operations in document["paths"].items() for method in operations]
    await expect(docs.page.locator(".opblock")).to_have_count(len(routes), timeout=TIMEOUT_MS)
    shown = [
        (await block.locator(".opblock-summary-path").get_attribute("data-path"), await method.inner_text())
        for block in await docs.page.locator(".opblock").all()
        for method in [block.locator(".opblock-summary-method")]
    ]
    assert sorted(shown) == sorted(routes)
    assert docs.problems == []


async def test_a_sandbox_can_be_allocated_from_the_page(stack: Stack, docs: ObservedPage) -> None:
    page = docs.page
    await page.locator(".btn.authorize").first.click()
    await page.locator(".auth-container", has_text="trackToken").get_by_role("textbox").fill(TRACK_TOKEN)
    await page.locator(".auth-container", has_text="trackToken").get_by_role("button", name="Apply").click()
    await page.locator(".modal-ux .btn-done").first.click()

    allocate = page.locator(".opblock", has=page.locator('[data-path="/v1/allocate"]'))
    await allocate.locator(".opblock-summary-control").click()
    await allocate.get_by_role("button", name="Try it out").click()
    student = allocate.locator('tr[data-param-name="X-Instruqt-Sandbox-ID"]').get_by_role("textbox")
    await student.fill("ada-in-a-browser")
    await allocate.get_by_role("button", name="Execute").click()

    response = allocate.locator(".live-responses-table .response").first
    await expect(response.locator(".response-col_status")).to_contain_text("201", timeout=TIMEOUT_MS)
    sandbox_id = await stack.database.fetchval("SELECT sandbox_id FROM leases WHERE holder = 'ada-in-a-browser'")
    await expect(response.locator(".response-col_description")).to_contain_text(f'"sandbox_id": "{sandbox_id}"')
    assert docs.problems == []
