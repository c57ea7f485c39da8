"""Console in a real browser on the running broker: sign-in, pages, actions, live updates, accessibility."""

import asyncio
import json
import os
import random
import re
import sys
import time
from collections.abc import AsyncIterator

import httpx
import pytest
from aio_pika import Message
from playwright.async_api import Browser, expect

from devstack import class_day
from devstack.conditions import wait_until
from devstack.ports import free_port
from devstack.processes import spawn
from devstack.testing import NewDatabase, NewVhost
from sandbox_broker.messaging.connection import open_connection
from tests.integration.console_page import Console, launch_browser, open_console, sign_in
from tests.integration.stack import ADMIN, ADMIN_TOKEN, ROOT, TRACK_TOKEN, Stack, run_stack

CLASS_STUDENTS = 60
AXE = ROOT / "services" / "console" / "node_modules" / "axe-core" / "axe.min.js"
PAGES = (
    "/",
    "/leases?only=all",
    "/sandboxes",
    "/deletions",
    "/sync",
    "/dead-letters",
    "/policies",
    "/tokens",
    "/tokens/new",
    "/audit",
)
HOSTILE = '=1+1"><img src=x onerror=alert(1)>'
"""Printable ASCII is all that the API accepts in names."""
POLICIES = {
    "policies": [
        {
            "name": "adventure",
            "match": {"track_name": "lab"},
            "lease_hours": 8,
            "stock": {"name_prefix": "sandbox-", "min": 1, "max": 100},
        }
    ]
}


@pytest.fixture(scope="module")
async def own_stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with new_database() as database_url, new_vhost() as amqp_url, run_stack(database_url, amqp_url) as stack:
        yield stack


@pytest.fixture(scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with launch_browser() as browser:
        yield browser


@pytest.fixture
async def stack(own_stack: Stack) -> Stack:
    await own_stack.fill(20)
    return own_stack


@pytest.fixture
async def console(stack: Stack, browser: Browser) -> AsyncIterator[Console]:
    async with open_console(browser, console_url(stack), ADMIN_TOKEN) as console:
        yield console


def console_url(stack: Stack) -> str:
    return stack.environment["CONSOLE_URL"]


async def lease(stack: Stack, student: str, track: str = "lab") -> str:
    response = await stack.allocate(student, X_Instruqt_Track_ID=track)
    assert response.status_code == 201, response.text
    sandbox_id: str = response.json()["sandbox_id"]
    return sandbox_id


async def apply_policies(stack: Stack) -> None:
    response = await stack.client.put(f"{stack.url}/v1/admin/policies", headers=ADMIN, json=POLICIES)
    assert response.status_code == 200, response.text


async def test_only_tokens_of_roles_sign_in(stack: Stack, browser: Browser) -> None:
    page = await browser.new_page()
    await page.goto(f"{console_url(stack)}/leases?only=all")
    await expect(page).to_have_title("Sign in · Sandbox Broker")
    await sign_in(page, TRACK_TOKEN)
    await expect(page.get_by_role("alert")).to_contain_text("for tracks")
    await sign_in(page, "an-unknown-token")
    await expect(page.get_by_role("alert")).to_contain_text("unknown")
    await sign_in(page, ADMIN_TOKEN)
    await expect(page).to_have_url(f"{console_url(stack)}/leases?only=all")
    (cookie,) = await page.context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Lax")
    assert ADMIN_TOKEN not in cookie["value"]
    await page.get_by_role("button", name="Sign out").click()
    await expect(page).to_have_title("Sign in · Sandbox Broker")
    await page.goto(f"{console_url(stack)}/")
    await expect(page).to_have_title("Sign in · Sandbox Broker")
    await page.context.close()


async def test_the_overview_follows_the_broker(stack: Stack, console: Console) -> None:
    page = console.page
    await expect(page.get_by_role("heading", level=1)).to_be_visible()
    leased = page.locator(".tile.allocated .value")
    await expect(leased).to_have_text(re.compile("^0"))
    began = time.monotonic()
    await lease(stack, "ann")
    await expect(leased).to_have_text(re.compile("^1"))
    assert time.monotonic() - began < 2 or os.getloadavg()[0] > 2  # a busy machine is slow for other reasons
    assert console.problems == []


async def test_the_overview_counts_all_waiting_students(stack: Stack, console: Console) -> None:
    for number in range(7):
        response = await stack.allocate(
            f"student-{number}", X_Sandbox_Name_Prefix="none-", Prefer="respond-async, wait=600"
        )
        assert response.status_code == 202, response.text
    await expect(console.page.locator(".tile.waiting .value")).to_have_text(re.compile("^7"))
    await expect(console.page.locator("[aria-labelledby=line]")).to_contain_text("2 more")
    assert console.problems == []


async def test_an_operator_ends_a_lease_with_a_reason(stack: Stack, console: Console) -> None:
    sandbox_id = await lease(stack, "ann")
    page = console.page
    await console.open("/leases")
    row = page.get_by_role("row", name=re.compile("ann"))
    await row.get_by_role("link", name="End", exact=True).click()
    dialog = page.get_by_role("dialog")
    await expect(dialog).to_contain_text("This ends the lab of student ann now")
    await dialog.get_by_role("link", name="Cancel").click()
    await expect(dialog).to_be_hidden()
    await row.get_by_role("link", name="End", exact=True).press("Enter")
    await dialog.get_by_label("Reason").fill("the student left")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.locator(".banner.done")).to_contain_text("The lease has ended")
    await expect(page.get_by_text("the student left").first).to_be_visible()
    story = (await stack.admin("GET", f"sandboxes/{sandbox_id}")).json()
    assert (story["end_reason"], story["end_note"]) == ("admin", "the student left")
    await console.open(f"/audit?object={sandbox_id}")
    entry = page.locator("tbody tr")
    await expect(entry).to_contain_text("the student left")
    await expect(entry).to_contain_text("lease.release")
    assert console.problems == []


async def test_a_lease_is_extended_and_a_sandbox_is_replaced(stack: Stack, console: Console) -> None:
    sandbox_id = await lease(stack, "ann")
    before = (await stack.admin("GET", f"sandboxes/{sandbox_id}")).json()["expires_at"]
    page = console.page
    await console.open(f"/actions/sandboxes/extend?id={sandbox_id}")
    await page.get_by_label("Hours to add").fill("3")
    await page.get_by_label("Reason").fill("slow lab")
    await page.get_by_role("button", name="Extend the lease").click()
    await expect(page.locator(".banner.done")).to_contain_text("The lease is extended")
    assert (await stack.admin("GET", f"sandboxes/{sandbox_id}")).json()["expires_at"] == before + 3 * 3600
    await page.get_by_role("link", name="Replace", exact=True).click()
    await page.get_by_role("dialog").get_by_label("Reason").fill("no network")
    await page.get_by_role("dialog").get_by_role("button", name="Replace the sandbox").click()
    await expect(page.locator(".banner.done")).to_contain_text("The student has sandbox")
    assert (await stack.admin("GET", f"sandboxes/{sandbox_id}")).json()["end_reason"] == "broken"


async def test_a_held_sync_is_approved(stack: Stack, console: Console) -> None:
    await stack.control("PATCH", "behaviour", {"listing_fraction": 0.1})
    try:
        assert (await stack.sync()).status_code == 409
        page = console.page
        await console.open("/")
        await expect(page.get_by_role("heading", name="A sync is held")).to_be_visible()
        await page.get_by_role("link", name="Open: A sync is held").click()
        await expect(page.locator(".changes")).to_contain_text("become stale")
        await page.get_by_role("link", name="Approve and apply").click()
        await page.get_by_role("dialog").get_by_label("Reason").fill("CSP is right")
        await page.get_by_role("dialog").get_by_role("button", name="Approve and apply").click()
        await expect(page.locator(".banner.done")).to_contain_text("The listing is applied")
        assert (await stack.stats())["stale"] >= 18
    finally:
        await stack.control("PATCH", "behaviour", {"listing_fraction": 1.0})


async def test_dead_letters_are_shown_and_dropped(stack: Stack, console: Console) -> None:
    payload = b'{"x": "</pre><script>alert(1)</script>"}'
    await stack.database.execute(
        "INSERT INTO dead_letters VALUES (gen_random_uuid(), now(), 'allocator.maintenance', '<b>why</b>', '{}', "
        "'m', 'c', 'application/json', $1)",
        payload,
    )
    page = console.page
    await console.open("/dead-letters")
    await page.get_by_role("rowheader").get_by_role("link").click()
    await expect(page.locator(".payload")).to_have_text(payload.decode())
    await page.get_by_role("link", name="Replay").click()
    await page.get_by_role("dialog").get_by_label("Reason").fill("try")
    await page.get_by_role("dialog").get_by_role("button", name="Replay the message").click()
    await expect(page.locator(".banner.done")).to_contain_text("The message is back")

    async def is_dead_again() -> bool:
        letters = (await stack.admin("GET", "dead-letters")).json()["dead_letters"]
        return bool(letters) and letters[0]["reason"] != "<b>why</b>"

    await wait_until(is_dead_again)
    await console.open("/dead-letters")
    await page.get_by_role("link", name="Drop").first.click()
    await page.get_by_role("dialog").get_by_label("Reason").fill("unreadable")
    await page.get_by_role("dialog").get_by_role("button", name="Drop the message").click()
    await expect(page.locator(".banner.done")).to_contain_text("removed")
    assert (await stack.admin("GET", "dead-letters")).json()["count"] == 0
    assert console.problems == []


async def test_hostile_names_are_harmless(stack: Stack, console: Console) -> None:
    await lease(stack, "=cmd()", HOSTILE)
    page = console.page
    await console.open("/leases")
    await expect(page.get_by_role("cell", name=HOSTILE)).to_be_visible()
    await page.locator("tbody a").first.click()
    await expect(page.get_by_role("heading", name="History")).to_be_visible()
    await console.open("/search?q=%3Dcmd()")
    await expect(page).to_have_url(re.compile(r"/leases\?only=all&student="))
    async with page.expect_download() as download:
        await page.get_by_role("link", name="CSV").click()
    text = (await (await download.value).path()).read_text()
    assert "'=cmd()" in text
    assert "'=1+1" in text
    assert console.problems == []


async def test_every_table_is_exported_without_formulas(stack: Stack, console: Console) -> None:
    await lease(stack, "=cmd()", HOSTILE)
    await stack.database.execute(
        "INSERT INTO dead_letters VALUES (gen_random_uuid(), now(), 'q', '=died()', '{}', 'm', 'c', 'text', '')"
    )
    await stack.admin("POST", f"sandboxes/{await lease(stack, 'ben')}/release", reason="+reason()")
    texts = {}
    for path in (
        "/leases",
        "/sandboxes?student=%3Dcmd()",
        "/dead-letters",
        "/tokens",
        "/audit?action=lease.release",
        "/deletions",
    ):
        await console.open(path)
        async with console.page.expect_download() as download:
            await console.page.get_by_role("link", name="CSV").click()
        texts[path] = (await (await download.value).path()).read_text()
    assert "'=cmd()" in texts["/leases"]
    _, row = texts["/sandboxes?student=%3Dcmd()"].splitlines()  # one row: the filter applies
    assert ",allocated," in row
    assert ",'=cmd(),\"'=1+1" in row
    assert ",'=died()," in texts["/dead-letters"]
    assert texts["/tokens"].startswith("name,role,tracks,")
    assert ",'+reason()," in texts["/audit?action=lease.release"]
    assert texts["/deletions"].startswith("sandbox_id,")
    assert console.problems == []


async def test_a_stopped_stock_is_resumed(stack: Stack, console: Console) -> None:
    await apply_policies(stack)
    await stack.database.execute(
        "INSERT INTO stock_prefixes (name_prefix, next_number, stopped_at, stop_cause, stop_reason) "
        "VALUES ('sandbox-', 100, now(), 'refused', 'the quota is used up') ON CONFLICT (name_prefix) DO UPDATE "
        "SET stopped_at = excluded.stopped_at, stop_cause = excluded.stop_cause, stop_reason = excluded.stop_reason"
    )
    page = console.page
    await console.open("/")
    await page.get_by_role("link", name="Open: No account is created for sandbox-: the quota is used up").click()
    await page.get_by_role("link", name="Resume the stock").click()
    await page.get_by_role("dialog").get_by_label("Reason").fill("the quota is raised")
    await page.get_by_role("dialog").get_by_role("button", name="Resume the stock").click()
    await expect(page.locator(".banner.done")).to_contain_text("The stock is resumed")
    await expect(page.get_by_role("link", name="Resume the stock")).to_have_count(0)
    (entry,) = (await stack.admin("GET", "audit", action="stock.resume")).json()["entries"]
    assert (entry["object"], entry["reason"], entry["outcome"]) == ("sandbox-", "the quota is raised", "done")
    assert console.problems == []


async def test_an_administrator_creates_a_token(stack: Stack, console: Console) -> None:
    page = console.page
    await console.open("/tokens")
    await page.get_by_role("link", name="Create a token").click()
    await page.get_by_label("Name", exact=True).fill("adventure")
    await page.get_by_label("Role").select_option("viewer")
    await page.get_by_label("Tracks").fill("lab-adventure, lab-dns")
    await page.get_by_label("Active leases").fill("30")
    await page.get_by_label("Reason").fill("the class of June")
    await page.get_by_role("button", name="Create the token").click()
    await expect(page.get_by_role("alert")).to_be_visible()  # a viewer has no tracks
    await expect(page.get_by_label("Tracks")).to_have_value("lab-adventure, lab-dns")
    await page.get_by_label("Role").select_option("track")
    await page.get_by_role("button", name="Create the token").click()
    token = await page.get_by_label("The token").inner_text()
    allocated = await stack.client.post(
        f"{stack.url}/v1/allocate",
        headers={
            "Authorization": f"Bearer {token}",
            "X-Instruqt-Sandbox-ID": "ann",
            "X-Instruqt-Track-ID": "lab-dns",
        },
    )
    assert allocated.status_code == 201, allocated.text
    await page.get_by_role("link", name="I have copied it").click()
    row = page.get_by_role("row", name=re.compile("adventure"))
    await expect(row).to_contain_text("lab-adventure, lab-dns")
    await expect(row).to_contain_text("30 active")
    assert token not in await page.content()
    (entry,) = (await stack.admin("GET", "audit", action="token.create", object="adventure")).json()["entries"]
    assert (entry["reason"], entry["outcome"]) == ("the class of June", "done")
    console.problems = [problem for problem in console.problems if "400" not in problem]  # the refused form
    assert console.problems == []


async def test_a_forged_form_creates_no_token(stack: Stack, console: Console) -> None:
    cookies = {str(cookie["name"]): str(cookie["value"]) for cookie in await console.page.context.cookies()}
    form = {"name": "forged", "role": "admin", "reason": "forged", "csrf": "guessed"}
    async with httpx.AsyncClient(trust_env=False, cookies=cookies) as client:
        assert (await client.post(f"{console.url}/tokens/new", data=form)).status_code == 403
    tokens = (await stack.admin("GET", "tokens")).json()["tokens"]
    assert "forged" not in [token["name"] for token in tokens]


async def test_a_class_day_is_watched_without_an_error(stack: Stack, console: Console) -> None:
    """Students and incidents of a day of `make demo`, as fast as the broker serves them."""
    await stack.fill(100)
    students = list(class_day.generate_students(1, random.Random(1)))[:CLASS_STUDENTS]
    page = console.page
    leased = page.locator(".tile.allocated .value")
    await console.open("/")
    sandboxes: dict[str, str] = {}
    for begin in range(0, CLASS_STUDENTS, 10):
        group = students[begin : begin + 10]
        ids = await asyncio.gather(*(lease(stack, student.name, student.track) for student in group))
        sandboxes |= {student.name: sandbox_id for student, sandbox_id in zip(group, ids, strict=True)}
        await expect(leased).to_have_text(re.compile(rf"^{len(sandboxes)}(?!\d)"))
    async with open_connection(stack.environment["AMQP_URL"]) as connection, connection.channel() as channel:
        message = Message(b'{"kind": "of an older version"}', content_type="application/json")
        await channel.default_exchange.publish(message, "allocator.maintenance")

    async def has_dead_letter() -> bool:
        return bool((await stack.admin("GET", "dead-letters")).json()["count"])

    await wait_until(has_dead_letter)
    await stack.control("PATCH", "behaviour", {"listing_fraction": 0.1})
    try:
        assert (await stack.sync()).status_code == 409
    finally:
        await stack.control("PATCH", "behaviour", {"listing_fraction": 1.0})
    for name, sandbox_id in sandboxes.items():
        assert (await stack.release(sandbox_id, name)).status_code == 200
    await expect(leased).to_have_text(re.compile("^0"))
    await expect(page.get_by_role("heading", name="1 message could not be processed")).to_be_visible()
    await expect(page.get_by_role("heading", name="A sync is held")).to_be_visible()
    await expect(page.locator("#offline")).to_be_hidden()
    assert console.problems == []


async def test_pages_are_accessible_in_both_themes(stack: Stack, console: Console) -> None:
    sandbox_id = await lease(stack, "ann")
    await apply_policies(stack)
    page = console.page
    axe = AXE.read_text()
    for path in (*PAGES, f"/sandboxes/{sandbox_id}", f"/actions/sandboxes/release?id={sandbox_id}", "/missing"):
        await console.open(path)
        # Playwright runs it outside of the Content-Security-Policy of the page.
        await page.evaluate(axe)
        for theme in ("light", "dark"):
            await page.emulate_media(color_scheme=theme, reduced_motion="reduce")
            found = await page.evaluate("axe.run().then(result => result.violations)")
            problems = [f"{one['id']}: {[node['html'] for node in one['nodes']][:3]}" for one in found]
            assert problems == [], (theme, path)
    console.problems = [problem for problem in console.problems if "404" not in problem]
    assert console.problems == []


async def test_no_page_is_wider_than_the_screen(stack: Stack, console: Console) -> None:
    await lease(
        stack, "a-student-with-a-long-name-of-an-organisation", "a-long-name-of-a-track-of-the-organisation"
    )
    for width in (390, 1024):
        await console.page.set_viewport_size({"width": width, "height": 800})
        for path in PAGES:
            await console.open(path)
            assert await console.page.evaluate("document.documentElement.scrollWidth") <= width, (path, width)


async def test_forms_of_other_sites_and_old_sessions_are_refused(stack: Stack, console: Console) -> None:
    sandbox_id = await lease(stack, "ann")
    cookies = {str(cookie["name"]): str(cookie["value"]) for cookie in await console.page.context.cookies()}
    url = f"{console.url}/actions/sandboxes/release"
    form = {"id": sandbox_id, "reason": "forged", "csrf": "guessed"}
    async with httpx.AsyncClient(trust_env=False, cookies=cookies) as client:
        refused = await client.post(url, data=form)
        assert refused.status_code == 403
        await console.open(f"/actions/sandboxes/release?id={sandbox_id}")
        csrf = await console.page.locator("main input[name=csrf]").get_attribute("value")
        form["csrf"] = csrf or ""
        other_site = await client.post(url, data=form, headers={"Sec-Fetch-Site": "cross-site"})
        assert other_site.status_code == 403
        without_reason = await client.post(url, data={**form, "reason": "  "})
        assert without_reason.status_code == 400
    async with httpx.AsyncClient(trust_env=False, cookies={"console_session": "forged"}) as client:
        answer = await client.get(f"{console.url}/leases")
        assert (answer.status_code, answer.headers["location"]) == (303, "/sign-in?next=%2Fleases")
        assert "unsafe-inline" not in answer.headers["content-security-policy"]
    assert (await stack.stats())["allocated"] == 1


async def test_reading_works_without_javascript(stack: Stack, browser: Browser) -> None:
    await lease(stack, "ann")
    context = await browser.new_context(java_script_enabled=False)
    page = await context.new_page()
    await page.goto(f"{console_url(stack)}/leases")
    await sign_in(page, ADMIN_TOKEN)
    await expect(page.get_by_role("rowheader", name="ann")).to_be_visible()
    await page.get_by_role("link", name="Student", exact=True).click()
    await expect(page).to_have_url(re.compile("sort=holder"))
    await page.get_by_role("link", name="End", exact=True).click()
    await expect(page.get_by_role("heading", name="End the lease")).to_be_visible()
    await context.close()


async def test_a_viewer_only_reads_and_a_token_is_revoked(stack: Stack, console: Console, browser: Browser) -> None:
    sandbox_id = await lease(stack, "ann")
    created = await stack.client.post(
        f"{stack.url}/v1/admin/tokens", headers=ADMIN, json={"name": "instructors", "role": "viewer"}
    )
    assert created.status_code == 201, created.text
    viewer = await (await browser.new_context()).new_page()
    await viewer.goto(f"{console.url}/leases")
    await sign_in(viewer, created.json()["token"])
    await expect(viewer.locator(".who")).to_contain_text("instructors")
    await expect(viewer.get_by_role("rowheader", name="ann")).to_be_visible()
    await expect(viewer.get_by_role("link", name="End", exact=True)).to_have_count(0)
    await expect(viewer.get_by_role("link", name="Tokens")).to_have_count(0)
    for path in (
        f"/actions/sandboxes/release?id={sandbox_id}",
        "/tokens",
        "/tokens/new",
        "/tokens.csv",
        "/audit.csv",
    ):
        await viewer.goto(f"{console.url}{path}")
        await expect(viewer.get_by_role("heading", level=1)).to_have_text("Your role does not permit this")

    page = console.page
    await console.open("/tokens")
    await page.get_by_role("link", name="Revoke").click()
    await page.get_by_role("dialog").get_by_label("Reason").fill("the class is over")
    await page.get_by_role("dialog").get_by_role("button", name="Revoke the token").click()
    await expect(page.locator(".banner.done")).to_contain_text("The token is revoked")
    await viewer.goto(f"{console.url}/leases")
    await expect(viewer).to_have_title("Sign in · Sandbox Broker")
    await viewer.context.close()
    assert console.problems == []


async def test_people_sign_in_with_openid_connect(stack: Stack, browser: Browser) -> None:
    port, console_port = free_port(), free_port()
    people = [{"sub": "ann", "email": "ann@example.com", "groups": ["ops"]}, {"sub": "eve", "groups": []}]
    options = [part for person in people for part in ("--user-claims", json.dumps(person))]
    provider = await spawn(
        "provider", [sys.executable, "-W", "ignore", "-m", "oidc_provider_mock", "--port", str(port), *options]
    )
    process = await stack.start_service(
        "console",
        name="console-oidc",
        settings={
            "CONSOLE_PORT": str(console_port),
            "CONSOLE_URL": f"http://127.0.0.1:{console_port}",
            "OIDC_ISSUER": f"http://127.0.0.1:{port}",
            "OIDC_CLIENT_ID": "console",
            "OIDC_CLIENT_SECRET": "secret-of-the-client",
            "OIDC_ROLES": "ops=operator",
            "CONSOLE_OPERATOR_TOKEN": ADMIN_TOKEN,
        },
    )
    try:
        await wait_until(lambda: stack.is_ready(f"http://127.0.0.1:{port}/.well-known/openid-configuration"))
        for person in ("eve", "ann"):
            context = await browser.new_context()
            page = await context.new_page()
            await page.goto(f"http://127.0.0.1:{console_port}/leases")
            await page.get_by_role("link", name="Sign in with your organisation").click()
            await page.locator("input[name=sub]").fill(person)
            await page.get_by_role("button", name=re.compile("authorize", re.I)).click()
            if person == "eve":
                await expect(page.get_by_role("alert")).to_contain_text("in no group with a role")
            else:
                await expect(page.locator(".who")).to_contain_text("ann@example.com")
                await expect(page).to_have_url(re.compile("/leases$"))
            await context.close()
    finally:
        await process.stop()
        await provider.stop()
