"""The pool's rules, without a database."""

import random

from allocator.domain import MAX_ROUND, held, rounds, segments
from sandbox_broker.contract.commands import AllocateSandbox, ExpireLeases

from .allocator_harness import ask, done


def holders(found: list[list[AllocateSandbox]]) -> list[list[str]]:
    return [[command.holder for command in one] for one in found]


def test_requests_of_different_students_share_a_round() -> None:
    assert holders(rounds([ask("ann"), ask("bob"), ask("cid", key="k")])) == [["ann", "bob", "cid"]]


def test_a_student_comes_once_in_a_round() -> None:
    commands = [ask("ann"), ask("ann", "lab-"), ask("ann", key="k"), ask("bob")]
    assert sorted(map(sorted, holders(rounds(commands)))) == [["ann"], ["ann"], ["ann", "bob"]]


def test_an_idempotency_key_comes_once_in_a_round() -> None:
    assert holders(rounds([ask("ann", key="k"), ask("bob", key="k")])) == [["ann"], ["bob"]]


def test_requests_without_a_key_do_not_share_one() -> None:
    assert len(rounds([ask("ann"), ask("bob")])) == 1


def test_nested_prefixes_go_into_rounds_of_their_own_the_most_specific_first() -> None:
    found = rounds([ask("any"), ask("lab", "lab-"), ask("lab-1", "lab-1"), ask("lab-12", "lab-12")])
    assert holders(found) == [["lab-12"], ["lab-1"], ["lab"], ["any"]]


def test_disjoint_prefixes_share_a_round() -> None:
    assert len(rounds([ask("ann", "aws-"), ask("bob", "gcp-"), ask("cid", "azure-"), ask("dan", "aws-")])) == 1


def test_a_round_has_a_limit() -> None:
    found = rounds([ask(f"student-{number}") for number in range(MAX_ROUND + 1)])
    assert [len(one) for one in found] == [MAX_ROUND, 1]


def test_no_request_is_lost_and_no_round_competes_with_itself() -> None:
    chance = random.Random(7)
    prefixes = [None, "a", "ab", "abc", "b", "ba", "c"]
    for _ in range(200):
        commands = [
            ask(f"student-{chance.randrange(8)}", chance.choice(prefixes), chance.choice([None, "k", "l", "m"]))
            for _ in range(chance.randrange(1, 25))
        ]
        found = rounds(commands)
        assert sorted(map(repr, commands)) == sorted(repr(command) for one in found for command in one)
        for one in found:
            keys = [command.idempotency_key for command in one if command.idempotency_key]
            wanted = {command.name_prefix or "" for command in one}
            assert len({command.holder for command in one}) == len(one)
            assert len(set(keys)) == len(keys)
            assert not any(a != b and a.startswith(b) for a in wanted for b in wanted)


def test_a_batch_without_conflict_is_one_segment() -> None:
    entries = [ask("ann"), ask("bob"), ask("ann"), done("1", "cid"), ExpireLeases(grace_sec=0, limit=1)]
    assert segments(entries) == [entries]


def test_a_release_stays_behind_the_allocation_of_the_same_student_and_the_other_way_round() -> None:
    asked, over = ask("ann"), done("1", "ann")
    assert segments([asked, ask("bob"), over]) == [[asked, ask("bob")], [over]]
    assert segments([over, asked, over]) == [[over], [asked], [over]]


def test_a_listing_within_the_limit_is_not_held() -> None:
    assert held(listed=75, lost=25, pool=100, max_stale_fraction=0.25) is None


def test_a_listing_above_the_limit_is_held_and_says_so() -> None:
    refused = held(listed=74, lost=26, pool=100, max_stale_fraction=0.25)
    assert refused is not None
    assert refused.code == "SYNC_HELD"
    assert "26 of 100" in refused.message
    assert "25%" in refused.message


def test_an_empty_listing_is_held_even_of_an_empty_pool() -> None:
    assert held(listed=0, lost=0, pool=0, max_stale_fraction=1) is not None


def test_the_first_listing_of_an_empty_pool_is_not_held() -> None:
    assert held(listed=10, lost=0, pool=0, max_stale_fraction=0) is None
