"""Redelivery detection."""

from types import SimpleNamespace
from typing import cast

import pytest
from aiormq.abc import DeliveredMessage

from allocator import redelivery
from allocator.redelivery import SeenEnvelopes


def delivery(
    correlation_id: str | None, reply_to: str | None = "replies", *, redelivered: bool = False
) -> DeliveredMessage:
    properties = SimpleNamespace(correlation_id=correlation_id, reply_to=reply_to)
    header = SimpleNamespace(properties=properties)
    return cast("DeliveredMessage", SimpleNamespace(header=header, redelivered=redelivered))


def test_the_mark_of_rabbitmq_is_a_redelivery() -> None:
    assert SeenEnvelopes().is_redelivery(delivery("1", redelivered=True))


def test_a_remembered_envelope_is_a_redelivery() -> None:
    seen = SeenEnvelopes()
    assert not seen.is_redelivery(delivery("1"))
    assert not seen.is_redelivery(delivery("1"))
    seen.remember(delivery("1"))
    assert seen.is_redelivery(delivery("1"))
    assert not seen.is_redelivery(delivery("2"))
    assert not seen.is_redelivery(delivery("1", "other replies"))


def test_an_envelope_without_an_id_is_not_remembered() -> None:
    seen = SeenEnvelopes()
    seen.remember(delivery(None))
    assert not seen.is_redelivery(delivery(None))


def test_the_oldest_envelope_is_forgotten_above_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redelivery, "MAX_SEEN", 2)
    seen = SeenEnvelopes()
    for number in range(3):
        seen.remember(delivery(str(number)))
    assert [seen.is_redelivery(delivery(str(number))) for number in range(3)] == [False, True, True]
