"""How a listing is cut up."""

import math
import random
import uuid
from datetime import UTC, datetime

import pytest

from csp_syncer.plan import PIECE, pieces
from sandbox_broker.csp import Account
from sandbox_broker.messages import ListedAccount


def account(number: int) -> Account:
    return Account(
        sandbox_id=str(number + 1),
        external_id=str(uuid.uuid4()),
        name=f"sandbox-{number}",
        sfdc_account_id=random.choice([None, "001"]),
        created_at=random.choice([None, datetime.now(UTC)]),
    )


@pytest.mark.parametrize("unreadable", [0, 1, PIECE + 1])
@pytest.mark.parametrize("count", [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 7])
def test_every_account_is_in_one_piece_in_order_and_unchanged(count: int, unreadable: int) -> None:
    accounts = tuple(account(number) for number in range(count))
    ids = [f"x-{number}" for number in range(unreadable)]
    cut = list(pieces(42, accounts, ids))
    assert {piece.listing_id for piece in cut} <= {42}
    assert len(cut) == math.ceil(max(count, unreadable) / PIECE)
    assert max((len(piece.accounts) for piece in cut), default=0) <= PIECE
    assert [one for piece in cut for one in piece.unreadable] == ids
    put_together = [listed for piece in cut for listed in piece.accounts]
    assert put_together == [ListedAccount.model_validate(one, from_attributes=True) for one in accounts]
