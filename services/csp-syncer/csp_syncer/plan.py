"""How a listing is cut up for its way to the allocator."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TypeVar

from sandbox_broker.csp import Account
from sandbox_broker.messages import ListedAccount, StageListing

T = TypeVar("T")

PIECE = 100
"""Accounts in one message: the allocator reads it between two batches of students, in about a millisecond."""


def pieces(listing_id: int, accounts: Sequence[Account], unreadable: Sequence[str] = ()) -> Iterator[StageListing]:
    for readable, rest in zip_longest(_cut(accounts), _cut(unreadable), fillvalue=()):
        yield StageListing(
            listing_id=listing_id,
            accounts=tuple(
                ListedAccount(
                    sandbox_id=account.sandbox_id,
                    external_id=account.external_id,
                    name=account.name,
                    sfdc_account_id=account.sfdc_account_id,
                    created_at=account.created_at,
                )
                for account in readable
            ),
            unreadable=tuple(rest),
        )


def _cut(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), PIECE):
        yield items[start : start + PIECE]
