"""Lease secret: a lease with a secret is repeated and changed only with it; a lease without one by any client."""

import hashlib
from typing import Any

import pytest

from allocator.handlers import lease_changes, leases
from allocator.write_session import WriteSession
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    ClaimLease,
    EndLease,
    ExtendLease,
    ReleaseSandbox,
    ReplaceSandbox,
)
from sandbox_broker.contract.replies import Refused, Reply, SandboxReleased, refuse

from .allocator_harness import RUN, Pool, allocate, granted_lease, refusal_code

SECRET, OTHER = (hashlib.sha256(text).hexdigest() for text in (b"the secret of ann", b"a guess"))
WRONG = [None, OTHER, SECRET[:-1] + ("0" if SECRET[-1] != "0" else "1")]


def request(secret_hash: str | None, **fields: Any) -> AllocateSandbox:
    return AllocateSandbox(request_id="request", holder="ann", secret_hash=secret_hash, **fields)


async def change(session: WriteSession, sandbox_id: str, secret_hash: str | None) -> list[Reply]:
    """Run each command that changes the lease of ann."""
    common: dict[str, Any] = {
        "request_id": "request",
        "sandbox_id": sandbox_id,
        "holder": "ann",
        "secret_hash": secret_hash,
    }
    extension = ExtendLease(extension_id=RUN, extension_sec=60, **common)
    return [
        *await lease_changes.claim_lease(session, [ClaimLease(**common)]),
        *await lease_changes.extend_lease(session, [extension]),
        *await lease_changes.replace_sandbox(session, [ReplaceSandbox(reason="broken", **common)]),
        *await leases.release_sandbox(session, [ReleaseSandbox(**common)]),
    ]


@pytest.mark.parametrize("wrong", WRONG, ids=["none", "other", "similar"])
async def test_another_secret_reaches_no_lease(pool: Pool, wrong: str | None) -> None:
    await pool.fill(3)
    session = await pool.write_session()
    (reply,) = await allocate(session, request(SECRET))
    sandbox_id = granted_lease(reply).sandbox_id
    assert await pool.value("SELECT encode(secret_hash, 'hex') FROM leases") == SECRET
    before = await pool.rows("SELECT * FROM leases")
    assert await allocate(session, request(wrong)) == [refuse("NOT_SANDBOX_OWNER", cause="secret")]
    assert [refusal_code(reply) for reply in await change(session, sandbox_id, wrong)] == ["NOT_SANDBOX_OWNER"] * 4
    assert await pool.rows("SELECT * FROM leases") == before
    assert not any(isinstance(reply, Refused) for reply in (await change(session, sandbox_id, SECRET))[:3])


async def test_the_same_secret_repeats_the_lease(pool: Pool) -> None:
    await pool.fill(2)
    session = await pool.write_session()
    (first,) = await allocate(session, request(SECRET))
    same, refused = await allocate(session, request(SECRET), request(OTHER))
    assert granted_lease(same).sandbox_id == granted_lease(first).sandbox_id
    assert refusal_code(refused) == "NOT_SANDBOX_OWNER"


async def test_of_two_secrets_in_one_batch_the_first_has_the_lease(pool: Pool) -> None:
    await pool.fill(2)
    first, second = await allocate(await pool.write_session(), request(SECRET), request(OTHER))
    assert granted_lease(first).new
    assert refusal_code(second) == "NOT_SANDBOX_OWNER"


@pytest.mark.parametrize("secret_hash", [None, SECRET])
async def test_a_lease_without_a_secret_ignores_it(pool: Pool, secret_hash: str | None) -> None:
    await pool.fill(2)
    session = await pool.write_session()
    (reply,) = await allocate(session, request(None))
    (again,) = await allocate(session, request(secret_hash))
    assert granted_lease(again).sandbox_id == granted_lease(reply).sandbox_id
    assert await pool.value("SELECT secret_hash FROM leases") is None
    replies = await change(session, granted_lease(reply).sandbox_id, secret_hash)
    assert not any(isinstance(reply, Refused) for reply in replies[:3])


async def test_a_replacement_and_a_claim_keep_the_secret(pool: Pool) -> None:
    await pool.fill(2)
    session = await pool.write_session()
    (reply,) = await allocate(session, request(SECRET, mode="standby"))
    common: dict[str, Any] = {
        "request_id": "r",
        "sandbox_id": granted_lease(reply).sandbox_id,
        "secret_hash": SECRET,
    }
    claim = ClaimLease(holder="ann", new_holder="bob", **common)
    (claimed,) = await lease_changes.claim_lease(session, [claim])
    assert granted_lease(claimed).new
    (replaced,) = await lease_changes.replace_sandbox(
        session, [ReplaceSandbox(holder="bob", reason="broken", **common)]
    )
    release = ReleaseSandbox(request_id="r", sandbox_id=granted_lease(replaced).sandbox_id, holder="bob")
    (refused,) = await leases.release_sandbox(session, [release])
    assert refusal_code(refused) == "NOT_SANDBOX_OWNER"
    (released,) = await leases.release_sandbox(session, [release.model_copy(update={"secret_hash": SECRET})])
    assert isinstance(released, SandboxReleased)


async def test_an_administrator_needs_no_secret(pool: Pool) -> None:
    await pool.fill(1)
    session = await pool.write_session()
    (reply,) = await allocate(session, request(SECRET))
    command = EndLease(request_id="r", sandbox_id=granted_lease(reply).sandbox_id, note="lost secret")
    assert isinstance(await leases.end_lease(session, command), SandboxReleased)


async def test_another_secret_does_not_take_a_place_in_line(pool: Pool) -> None:
    session = await pool.write_session()
    await allocate(session, request(SECRET, wait_sec=900))
    for wait_sec in (900, 0, None):
        (reply,) = await allocate(session, request(OTHER, wait_sec=wait_sec))
        assert refusal_code(reply) == "NOT_SANDBOX_OWNER"
    await pool.fill(1)
    (reply,) = await allocate(session, request(SECRET, wait_sec=900))
    assert granted_lease(reply).new
