"""How a listing is cut up for its way to the allocator."""

from collections.abc import Iterator

from sandbox_broker.csp import Account
from sandbox_broker.messages import ListedAccount, StageListing

PIECE = 500
"""Accounts in one message: an allocation waits for one such piece at most."""


def pieces(listing_id: int, accounts: tuple[Account, ...]) -> Iterator[StageListing]:
    for start in range(0, len(accounts), PIECE):
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
                for account in accounts[start : start + PIECE]
            ),
        )
