"""Routes that change a lease: extend, claim, replace, for students and administrators."""

from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandbox_broker.contract.commands import AllocateSandbox, ClaimLease, Command, ExtendLease, ReplaceSandbox
from sandbox_broker.contract.replies import LeaseGranted, Reply, StudentWaiting
from sandbox_broker.contract.replies import refuse as refusal

from .gateway_harness import ADMIN, LEASE, STUDENT, Gateway, detail, running, say_nothing

SANDBOX = "/v1/sandboxes/2012224"
ADMIN_SANDBOX = "/v1/admin/sandboxes/2012224"
LEASE_BODY = {
    "sandbox_id": "2012224",
    "name": "sandbox-1",
    "external_id": "af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3",
    "allocated_at": 1728054123,
    "expires_at": 1728068523,
    "sfdc_account_id": None,
}
STANDBY = LEASE.model_copy(update={"mode": "standby"})


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, allocate_timeout_sec=0.5) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


def only_command(gateway: Gateway) -> Any:
    (command,) = gateway.allocator.commands
    return command


def answer_with(reply: Reply) -> Any:
    async def answer(_: Command) -> Reply:
        return reply

    return answer


async def test_a_standby_lease_is_asked_for_by_a_header(gateway: Gateway) -> None:
    gateway.allocator.answer = answer_with(STANDBY)
    response = await gateway.allocate(X_Lease_Mode="Standby")
    assert response.status_code == 201
    assert response.json() == LEASE_BODY | {"mode": "standby", "claimed_at": None}
    command = only_command(gateway)
    assert isinstance(command, AllocateSandbox)
    assert command.mode == "standby"


async def test_without_the_header_the_response_is_that_of_earlier_versions(gateway: Gateway) -> None:
    response = await gateway.allocate()
    assert response.json() == LEASE_BODY
    assert list(response.json()) == list(LEASE_BODY)
    assert only_command(gateway).mode == "active"


@pytest.mark.parametrize("mode", ["hot", "standby,active", "stand by"])
async def test_an_unknown_mode_is_refused(gateway: Gateway, mode: str) -> None:
    response = await gateway.allocate(X_Lease_Mode=mode)
    assert response.status_code == 400
    assert detail(response)["code"] == "INVALID_HEADER"
    assert detail(response)["message"] == f"X-Lease-Mode is '{mode}'. Send standby, or omit the header."


async def test_a_new_holder_does_not_look_like_a_pseudonym(gateway: Gateway) -> None:
    response = await gateway.client.post(f"{SANDBOX}/claim", headers={**STUDENT, "X-New-Holder": "forgotten-ann"})
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_HEADER")
    assert gateway.allocator.commands == []


async def test_a_claim_names_the_new_holder(gateway: Gateway) -> None:
    gateway.allocator.answer = answer_with(LEASE.model_copy(update={"claimed_at": 1728060000}))
    response = await gateway.client.post(f"{SANDBOX}/claim", headers={**STUDENT, "X-New-Holder": "ann"})
    assert response.status_code == 200
    assert response.json() == LEASE_BODY | {"mode": "active", "claimed_at": 1728060000}
    command = only_command(gateway)
    assert isinstance(command, ClaimLease)
    assert (command.sandbox_id, command.holder, command.new_holder) == ("2012224", "student-1", "ann")


async def test_a_blank_new_holder_keeps_the_holder(gateway: Gateway) -> None:
    # An unset variable of a script arrives as a blank header.
    await gateway.client.post(f"{SANDBOX}/claim", headers={**STUDENT, "X-New-Holder": " "})
    assert only_command(gateway).new_holder is None


async def test_a_student_waits_for_a_replacement(gateway: Gateway) -> None:
    gateway.allocator.answer = answer_with(
        StudentWaiting(position=1, waiting_since=1728054123, estimated_wait_sec=None, retry_after=2)
    )
    headers = {**STUDENT, "Prefer": "respond-async, wait=60"}
    response = await gateway.client.post(f"{SANDBOX}/replace", headers=headers, json={"reason": "no DNS"})
    assert (response.status_code, response.headers["Retry-After"]) == (202, "2")
    assert response.headers["Preference-Applied"] == "respond-async"
    assert response.json()["status"] == "waiting"
    assert only_command(gateway).wait_sec == 60


async def test_an_extension_needs_no_content_type(gateway: Gateway) -> None:
    response = await gateway.client.post(f"{SANDBOX}/extend", headers=STUDENT, content=b'{"hours": 1.5}')
    assert response.status_code == 200
    assert response.json() == {"expires_at": 1728075723, "max_expires_at": 1728082923}
    command = only_command(gateway)
    assert isinstance(command, ExtendLease)
    assert (command.sandbox_id, command.holder, command.extension_sec) == ("2012224", "student-1", 5400)


async def test_an_idempotency_key_names_one_extension_of_one_lease(gateway: Gateway) -> None:
    for path, holder, key in (
        (SANDBOX, "ann", "k"),
        (SANDBOX, "ann", "k"),
        (SANDBOX, "ann", "other"),
        (SANDBOX, "bob", "k"),
        ("/v1/sandboxes/1", "ann", "k"),
        (SANDBOX, "ann", ""),
        (SANDBOX, "ann", ""),
    ):
        headers = {**STUDENT, "X-Instruqt-Sandbox-ID": holder, "Idempotency-Key": key}
        assert (await gateway.client.post(f"{path}/extend", headers=headers, json={"hours": 1})).is_success
    first, repeated, *others = [command.extension_id for command in gateway.allocator.commands]  # type: ignore[union-attr]
    assert first == repeated
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    ("content", "field"),
    [
        (b"", "body"),
        (b"{", "body"),
        (b"[]", "body"),
        (b"{}", "hours"),
        (b'{"hours": 0}', "hours"),
        (b'{"hours": -1}', "hours"),
        (b'{"hours": "2"}', "hours"),
        (b'{"hours": true}', "hours"),
        (b'{"hours": NaN}', "hours"),
        (b'{"hours": 1e9}', "hours"),
        (b"\xff", "body"),
    ],
)
async def test_an_invalid_extension_is_refused_with_an_example(
    gateway: Gateway, content: bytes, field: str
) -> None:
    response = await gateway.client.post(f"{SANDBOX}/extend", headers=STUDENT, content=content)
    assert response.status_code == 400
    assert detail(response)["code"] == "INVALID_REQUEST"
    assert [entry["field"] for entry in detail(response)["fields"]] == [field]
    assert detail(response)["message"].endswith('Send JSON like {"hours": 2}.')
    assert not gateway.allocator.commands


async def test_the_token_is_checked_before_the_body(gateway: Gateway) -> None:
    for path in ("extend", "replace"):
        response = await gateway.client.post(f"{SANDBOX}/{path}", content=b"{")
        assert response.status_code == 401


async def test_a_time_out_of_an_extension_without_a_key_asks_to_check_first(gateway: Gateway) -> None:
    gateway.allocator.answer = say_nothing
    body = {"hours": 1}
    without = await gateway.client.post(f"{SANDBOX}/extend", headers=STUDENT, json=body)
    with_key = await gateway.client.post(
        f"{SANDBOX}/extend", headers={**STUDENT, "Idempotency-Key": "k"}, json=body
    )
    assert without.status_code == with_key.status_code == 504
    assert "Check its expires_at before you repeat the request" in detail(without)["message"]
    assert "Repeat it to get its result" in detail(with_key)["message"]


@pytest.mark.parametrize(
    ("reply", "status", "message"),
    [
        (refusal("EXTENSION_LIMIT", sandbox_id="1", left_hours="1.5"), 409, "by 1.5 more hours"),
        (refusal("NOT_CLAIMED", sandbox_id="1"), 409, "Claim it first"),
        (refusal("LEASE_ENDED", sandbox_id="1"), 409, "Allocate again"),
        (refusal("IDEMPOTENCY_KEY_CONFLICT", cause="other_extension", hours="2"), 409, "extension by 2 hours"),
    ],
)
async def test_a_refused_extension_states_the_next_action(
    gateway: Gateway, reply: Reply, status: int, message: str
) -> None:
    gateway.allocator.answer = answer_with(reply)
    response = await gateway.client.post(f"{SANDBOX}/extend", headers=STUDENT, json={"hours": 1})
    assert response.status_code == status
    assert message in detail(response)["message"]


@pytest.mark.parametrize(("new", "status"), [(True, 201), (False, 200)])
async def test_a_replacement_returns_the_other_sandbox(gateway: Gateway, new: bool, status: int) -> None:
    gateway.allocator.answer = answer_with(LEASE.model_copy(update={"new": new}))
    response = await gateway.client.post(f"{SANDBOX}/replace", headers=STUDENT, json={"reason": "no DNS"})
    assert response.status_code == status
    assert response.json() == LEASE_BODY
    command = only_command(gateway)
    assert isinstance(command, ReplaceSandbox)
    assert (command.sandbox_id, command.holder, command.reason) == ("2012224", "student-1", "no DNS")


@pytest.mark.parametrize("reason", [None, "", "  ", "x" * 501, "a\0b", 7])
async def test_a_replacement_needs_a_reason(gateway: Gateway, reason: object) -> None:
    response = await gateway.client.post(f"{SANDBOX}/replace", headers=STUDENT, json={"reason": reason})
    assert response.status_code == 400
    assert [entry["field"] for entry in detail(response)["fields"]] == ["reason"]


async def test_administrators_extend_and_replace_for_any_student(gateway: Gateway) -> None:
    extended = await gateway.client.post(
        f"{ADMIN_SANDBOX}/extend", headers=ADMIN, params={"hours": "0.5", "reason": "exam"}
    )
    assert extended.json() == {"expires_at": 1728075723, "max_expires_at": 1728082923}
    replaced = await gateway.client.post(f"{ADMIN_SANDBOX}/replace", headers=ADMIN, params={"reason": "no DNS"})
    assert (replaced.status_code, replaced.json()) == (201, LEASE_BODY)
    extension, replacement = gateway.allocator.commands
    assert isinstance(extension, ExtendLease)
    assert (extension.holder, extension.extension_sec, extension.note) == (None, 1800, "exam")
    assert isinstance(replacement, ReplaceSandbox)
    assert (replacement.holder, replacement.reason) == (None, "no DNS")


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("extend", {"hours", "reason"}),
        ("extend?hours=0&reason=exam", {"hours"}),
        ("extend?hours=inf&reason=exam", {"hours"}),
        ("extend?hours=2&reason=%20", {"reason"}),
        ("replace", {"reason"}),
    ],
)
async def test_administrators_must_give_a_reason(gateway: Gateway, path: str, fields: set[str]) -> None:
    response = await gateway.client.post(f"{ADMIN_SANDBOX}/{path}", headers=ADMIN)
    assert response.status_code == 400
    assert {entry["field"] for entry in detail(response)["fields"]} == fields


@pytest.mark.parametrize("path", ["extend?hours=2&reason=exam", "replace?reason=exam"])
async def test_a_track_token_may_not_act_for_other_students(gateway: Gateway, path: str) -> None:
    response = await gateway.client.post(f"{ADMIN_SANDBOX}/{path}", headers=STUDENT)
    assert (response.status_code, detail(response)["code"]) == (403, "FORBIDDEN")


@pytest.mark.parametrize("path", ["extend", "claim", "replace"])
async def test_an_invalid_sandbox_id_is_404(gateway: Gateway, path: str) -> None:
    body = {"hours": 1, "reason": "no DNS"}
    response = await gateway.client.post(f"/v1/sandboxes/%00/{path}", headers=STUDENT, json=body)
    assert (response.status_code, detail(response)["code"]) == (404, "SANDBOX_NOT_FOUND")


def test_a_reply_of_the_previous_version_is_an_active_lease() -> None:
    fields = LEASE.model_dump(exclude={"mode", "claimed_at"})
    assert LeaseGranted.model_validate(fields) == LEASE
