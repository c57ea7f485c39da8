"""Policy book: the policy of a request, and its terms."""

import pytest

from allocator.policy_book import PolicyBook, build_terms
from sandbox_broker.contract.policies import Access, Match, Policy, StockRule

from .allocator_harness import DEFAULT_TERMS, Pool

POLICIES = (
    Policy(name="track", match=Match(track_name="lab-adventure")),
    Policy(name="tracks", match=Match(track_prefix="lab-")),
    Policy(name="more tracks", match=Match(track_prefix="lab-adventure-2")),
    Policy(name="names", match=Match(name_prefix="aws-")),
    Policy(name="long names", match=Match(name_prefix="aws-europe-west-")),
    Policy(name="same length", match=Match(name_prefix="lab-adventure")),
    Policy(name="stock", stock=StockRule(name_prefix="gcp-", min=1, max=2)),
)


async def book_of(pool: Pool, *policies: Policy) -> PolicyBook:
    await pool.apply_policies(*policies)
    book = PolicyBook(DEFAULT_TERMS)
    await book.load((await pool.write_session()).connection)
    return book


@pytest.mark.parametrize(
    ("track_name", "name_prefix", "policy"),
    [
        (None, None, None),
        ("", "", None),
        ("other", "other-", None),
        ("lab-adventure", None, "track"),
        ("Lab-adventure", None, None),
        ("lab-adventure-1", None, "tracks"),
        ("lab-adventure-2", None, "more tracks"),
        ("lab-adventure-25", None, "more tracks"),
        ("lab", None, None),
        (None, "aws-", "names"),
        (None, "aws", None),
        (None, "aws-1", "names"),
        ("lab-adventure", "aws-1", "track"),
        ("lab-x", "aws-1", "tracks"),
        ("lab-adventure", "aws-europe-west-1", "long names"),
        ("lab-adventure", "lab-adventure", "track"),
        ("other", "lab-adventure", "same length"),
        (None, "gcp-", None),
    ],
)
async def test_the_longest_match_wins(
    pool: Pool, track_name: str | None, name_prefix: str | None, policy: str | None
) -> None:
    book = await book_of(pool, *POLICIES)
    assert book.resolve(track_name=track_name, name_prefix=name_prefix).policy == policy


async def test_a_policy_without_match_applies_to_the_other_requests(pool: Pool) -> None:
    book = await book_of(pool, *POLICIES, Policy(name="default", max_active=7))
    assert book.resolve(track_name="other", name_prefix="gcp-").max_active == 7
    assert book.resolve(track_name="lab-adventure", name_prefix=None).max_active is None
    assert (await book_of(pool)).resolve(track_name="other", name_prefix=None) == DEFAULT_TERMS


def test_a_policy_replaces_only_the_defaults_that_it_names() -> None:
    assert build_terms(Policy(name="p"), DEFAULT_TERMS) == DEFAULT_TERMS._replace(policy="p")
    policy = Policy(
        name="p",
        lease_hours=8.5,
        max_extension_hours=0,
        standby_hours=48,
        max_replacements=0,
        wait_minutes=0.5,
        max_active=0,
        access=Access(groups=("user",)),
    )
    terms = build_terms(policy, DEFAULT_TERMS)
    assert terms == ("p", 30_600, 0, 172_800, 0, 30, 0, ("user",))


def test_a_lease_lasts_at_least_one_second() -> None:
    assert build_terms(Policy(name="p", lease_hours=1e-9), DEFAULT_TERMS).lease_sec == 1
