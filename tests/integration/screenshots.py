"""Pictures of the console for the documentation: `make screenshots`. Its name keeps it out of `make test`."""

import os
import sys
from pathlib import Path

from playwright.async_api import Browser, Page, async_playwright, expect

from devstack import chromium
from devstack.output import Terminal
from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import ADMIN, ADMIN_TOKEN, ROOT, Stack, run_stack

IMAGES = ROOT / "docs" / "images"
# A day with two classes.
SAMPLES = """
INSERT INTO pool_samples
SELECT
    at, (96 - 40 * a - 62 * b)::bigint, (6 + 40 * a + 62 * b)::bigint, (1 + 18 * c)::bigint, 0, 0, (9 * d)::bigint
FROM (
    SELECT at,
        exp(greatest(-60, -power(hour - 9.4, 2) / 0.5)) AS a,
        exp(greatest(-60, -power(hour - 14.2, 2) / 0.7)) AS b,
        exp(greatest(-60, -power(hour - 16.5, 2) / 0.6)) AS c,
        exp(greatest(-60, -power(hour - 14.1, 2) / 0.03)) AS d
    FROM (
        SELECT at, 24 - extract(epoch FROM now() - at)::float / 3600 AS hour
        FROM generate_series(
            date_bin('30 seconds', now() - interval '24 hours', 'epoch'), now() - interval '2 minutes', '30 seconds'
        ) at
    ) hours
) shares
ON CONFLICT DO NOTHING
"""
POLICIES = {
    "policies": [
        {
            "name": "adventure",
            "match": {"track_name": "lab-adventure"},
            "lease_hours": 8,
            "max_active": 100,
            "stock": {"name_prefix": "lab-adventure-", "min": 20, "max": 80},
        },
        {"name": "dns", "match": {"track_prefix": "dns-"}, "lease_hours": 4},
    ]
}


async def test_take_screenshots(new_database: NewDatabase, new_vhost: NewVhost) -> None:
    IMAGES.mkdir(exist_ok=True)
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url) as stack,
        async_playwright() as playwright,
    ):
        await _play_class(stack)
        browser = await playwright.chromium.launch(
            executable_path=await chromium.find_chromium(Terminal()), chromium_sandbox=os.geteuid() != 0
        )
        await _take(browser, stack)
        await browser.close()
    sys.stdout.write(f"The pictures are in {IMAGES}\n")


async def _play_class(stack: Stack) -> None:
    await stack.fill(60, name_prefix="lab-adventure-")
    await stack.control("POST", "accounts", {"count": 40, "name_prefix": "lab-dns-"})
    await stack.sync()
    for number in range(18):
        track = ("dns-basics", "lab-adventure", "dns-security")[number % 3]
        prefix = "lab-adventure-" if track == "lab-adventure" else "lab-dns-"
        response = await stack.allocate(
            f"inst-student-{number:02d}", X_Instruqt_Track_ID=track, X_Sandbox_Name_Prefix=prefix
        )
        response.raise_for_status()
        if number == 4:
            await stack.release(response.json()["sandbox_id"], f"inst-student-{number:02d}")
    await stack.client.put(f"{stack.url}/v1/admin/policies", headers=ADMIN, json=POLICIES)
    await stack.database.execute(SAMPLES)
    await stack.database.execute(
        "INSERT INTO dead_letters VALUES (gen_random_uuid(), now() - interval '3 minutes', "
        "'allocator.maintenance', 'It is no envelope of commands', '{}', 'm', 'c', 'application/json', '{}')"
    )


async def _take(browser: Browser, stack: Stack) -> None:
    url = stack.environment["CONSOLE_URL"]
    page = await _sign_in(browser, url, "light", 1440, 900)
    await _save_overview(page, "console-overview.png")
    await page.goto(f"{url}/leases")
    await page.get_by_role("link", name="End", exact=True).first.click()
    await page.get_by_role("dialog").get_by_label("Reason").fill("The student left the class")
    await _save(page, "console-action.png")
    await page.goto(f"{url}/leases")
    await page.locator("tbody td a").first.click()
    await page.get_by_role("heading", name="History").wait_for()
    await _save(page, "console-sandbox.png")
    page = await _sign_in(browser, url, "dark", 1440, 900)
    await page.goto(f"{url}/leases")
    await _save(page, "console-leases-dark.png")
    page = await _sign_in(browser, url, "light", 390, 844)
    await _save_overview(page, "console-phone.png")


async def _save_overview(page: Page, name: str) -> None:
    """On a busy machine, wait until each part has answered in time. The page looks again by itself."""
    await expect(page.locator(".services li:not(.up)")).to_have_count(0, timeout=60_000)
    await expect(page.locator(".chart canvas")).to_be_visible()
    await _save(page, name)


async def _sign_in(browser: Browser, url: str, theme: str, width: int, height: int) -> Page:
    context = await browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=theme,  # type: ignore[arg-type]
        locale="en-GB",
    )
    page = await context.new_page()
    await page.goto(f"{url}/sign-in")
    await page.get_by_label("Token").fill(ADMIN_TOKEN)
    await page.get_by_role("button", name="Sign in with a token").click()
    await page.wait_for_url(f"{url}/")
    return page


async def _save(page: Page, name: str) -> None:
    await page.evaluate("document.fonts.ready")
    await page.screenshot(path=Path(IMAGES / name))
