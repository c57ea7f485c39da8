"""Splits a listing into commands of bounded size."""

from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import TypeVar

from sandbox_broker.contract.commands import ListedAccount, StageListing
from sandbox_broker.csp.client import Account

T = TypeVar("T")

BATCH_SIZE = 100
"""Accounts in one command. The allocator handles one between two batches of students, in about a millisecond."""


def split_listing(
    listing_id: int, accounts: Sequence[Account], unreadable: Sequence[str] = ()
) -> Iterator[StageListing]:
    """Yield commands that stage all accounts and all unreadable sandbox ids once, in order."""
    for account_batch, unreadable_batch in zip_longest(_split(accounts), _split(unreadable), fillvalue=()):
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
                for account in account_batch
            ),
            unreadable=tuple(unreadable_batch),
        )


def _split(items: Sequence[T]) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), BATCH_SIZE):
        yield items[start : start + BATCH_SIZE]
