"""Tests of the error table in api/error_table.py."""

from typing import Any

import pytest

from gateway.api.error_table import ERRORS
from gateway.api.errors import from_refusal
from sandbox_broker.contract.replies import RefusalCode, Refused, refuse


@pytest.mark.parametrize(
    ("code", "parameters", "message"),
    [
        ("POOL_EXHAUSTED", {}, "No available sandboxes in pool. Try again later, or ask the operator for more."),
        (
            "SANDBOX_NOT_FOUND",
            {"sandbox_id": "7"},
            "There is no sandbox '7'. Use the sandbox_id of the allocation.",
        ),
        (
            "NOT_ALLOCATED",
            {"sandbox_id": "7", "status": "stale"},
            "Sandbox '7' is stale and was never leased. There is no lease to end.",
        ),
        (
            "SYNC_HELD",
            {"reason": "CSP listed no sandbox at all"},
            "CSP listed no sandbox at all; nothing was changed. Inspect the planned changes of the held sync. "
            "If CSP is right, force the sync.",
        ),
        (
            "CSP_UNAVAILABLE",
            {"cause": "deletions_paused", "problem": "CSP keeps failing", "pause_sec": 30},
            "CSP keeps failing, so deletions pause. They continue automatically; the next attempt is in 30 s.",
        ),
    ],
)
def test_a_refusal_is_worded_with_its_parameters(
    code: RefusalCode, parameters: dict[str, Any], message: str
) -> None:
    assert from_refusal(refuse(code, **parameters)).message == message


@pytest.mark.parametrize(
    ("code", "parameters"),
    [("NOT_ALLOCATED", {"sandbox_id": "7"}), ("IDEMPOTENCY_KEY_CONFLICT", {"cause": "of a newer version"})],
)
def test_a_refusal_without_wording_gets_the_meaning_and_the_advice(
    code: RefusalCode, parameters: dict[str, Any]
) -> None:
    spec = ERRORS[code]
    assert from_refusal(refuse(code, **parameters)).message == f"{spec.meaning}. {spec.advice}"


def test_a_refusal_of_the_previous_version_keeps_its_message() -> None:
    refusal = Refused(code="POOL_EXHAUSTED", message="No sandbox left.")
    assert from_refusal(refusal).message == "No sandbox left."


def test_a_value_is_never_read_as_a_template() -> None:
    refusal = refuse("POOL_EXHAUSTED", cause="name_prefix", name_prefix="{cause.__class__}")
    assert "'{cause.__class__}'" in from_refusal(refusal).message
