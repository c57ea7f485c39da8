"""Tests of chunking.py."""

import math
import random
import uuid
from datetime import UTC, datetime

import pytest

from csp_syncer.chunking import BATCH_SIZE, split_listing
from sandbox_broker.contract.commands import ListedAccount
from sandbox_broker.csp.client import Account


def account(number: int) -> Account:
    return Account(
        sandbox_id=str(number + 1),
        external_id=str(uuid.uuid4()),
        name=f"sandbox-{number}",
        sfdc_account_id=random.choice([None, "001"]),
        created_at=random.choice([None, datetime.now(UTC)]),
    )


@pytest.mark.parametrize("unreadable", [0, 1, BATCH_SIZE + 1])
@pytest.mark.parametrize(
    "count", [0, 1, BATCH_SIZE - 1, BATCH_SIZE, BATCH_SIZE + 1, 2 * BATCH_SIZE, 3 * BATCH_SIZE + 7]
)
def test_split_keeps_every_account_once_and_in_order(count: int, unreadable: int) -> None:
    accounts = tuple(account(number) for number in range(count))
    ids = [f"x-{number}" for number in range(unreadable)]
    commands = list(split_listing(42, accounts, ids))
    assert {command.listing_id for command in commands} <= {42}
    assert len(commands) == math.ceil(max(count, unreadable) / BATCH_SIZE)
    assert max((len(command.accounts) for command in commands), default=0) <= BATCH_SIZE
    assert [sandbox_id for command in commands for sandbox_id in command.unreadable] == ids
    joined = [listed for command in commands for listed in command.accounts]
    assert joined == [ListedAccount.model_validate(one, from_attributes=True) for one in accounts]
