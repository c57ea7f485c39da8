"""Rules of the pool without a database."""

import random

import pytest

from allocator.domain import (
    MAX_GROUP,
    conflict_free_groups,
    find_growth_problem,
    find_loss_problem,
    split_on_conflict,
)
from sandbox_broker.contract.commands import AllocateSandbox, ExpireLeases

from .allocator_harness import allocate_command, release_command


def list_holders(groups: list[list[AllocateSandbox]]) -> list[list[str]]:
    return [[command.holder for command in group] for group in groups]


def test_requests_of_different_students_share_a_group() -> None:
    assert list_holders(
        conflict_free_groups([allocate_command("ann"), allocate_command("bob"), allocate_command("cid", key="k")])
    ) == [["ann", "bob", "cid"]]


def test_a_group_contains_a_student_once() -> None:
    commands = [
        allocate_command("ann"),
        allocate_command("ann", "lab-"),
        allocate_command("ann", key="k"),
        allocate_command("bob"),
    ]
    assert sorted(map(sorted, list_holders(conflict_free_groups(commands)))) == [["ann"], ["ann"], ["ann", "bob"]]


def test_a_group_contains_an_idempotency_key_once() -> None:
    assert list_holders(
        conflict_free_groups([allocate_command("ann", key="k"), allocate_command("bob", key="k")])
    ) == [
        ["ann"],
        ["bob"],
    ]


def test_requests_without_a_key_do_not_conflict() -> None:
    assert len(conflict_free_groups([allocate_command("ann"), allocate_command("bob")])) == 1


def test_nested_prefixes_get_separate_groups_longest_first() -> None:
    groups = conflict_free_groups(
        [
            allocate_command("any"),
            allocate_command("lab", "lab-"),
            allocate_command("lab-1", "lab-1"),
            allocate_command("lab-12", "lab-12"),
        ]
    )
    assert list_holders(groups) == [["lab-12"], ["lab-1"], ["lab"], ["any"]]


def test_disjoint_prefixes_share_a_group() -> None:
    assert (
        len(
            conflict_free_groups(
                [
                    allocate_command("ann", "aws-"),
                    allocate_command("bob", "gcp-"),
                    allocate_command("cid", "azure-"),
                    allocate_command("dan", "aws-"),
                ]
            )
        )
        == 1
    )


def test_a_group_has_a_maximum_size() -> None:
    groups = conflict_free_groups([allocate_command(f"student-{number}") for number in range(MAX_GROUP + 1)])
    assert [len(group) for group in groups] == [MAX_GROUP, 1]


def test_groups_contain_every_request_once_and_are_free_of_conflicts() -> None:
    chance = random.Random(7)
    prefixes = [None, "a", "ab", "abc", "b", "ba", "c"]
    for _ in range(200):
        commands = [
            allocate_command(
                f"student-{chance.randrange(8)}", chance.choice(prefixes), chance.choice([None, "k", "l", "m"])
            )
            for _ in range(chance.randrange(1, 25))
        ]
        groups = conflict_free_groups(commands)
        assert sorted(map(repr, commands)) == sorted(repr(command) for group in groups for command in group)
        for group in groups:
            keys = [command.idempotency_key for command in group if command.idempotency_key]
            prefixes_in_group = {command.name_prefix or "" for command in group}
            assert len({command.holder for command in group}) == len(group)
            assert len(set(keys)) == len(keys)
            assert not any(a != b and a.startswith(b) for a in prefixes_in_group for b in prefixes_in_group)


def test_a_batch_without_conflict_is_not_split() -> None:
    entries = [
        allocate_command("ann"),
        allocate_command("bob"),
        allocate_command("ann"),
        release_command("1", "cid"),
        ExpireLeases(grace_sec=0, limit=1),
    ]
    assert split_on_conflict(entries) == [entries]


def test_allocations_and_releases_of_a_student_keep_their_order() -> None:
    allocation, release = allocate_command("ann"), release_command("1", "ann")
    assert split_on_conflict([allocation, allocate_command("bob"), release]) == [
        [allocation, allocate_command("bob")],
        [release],
    ]
    assert split_on_conflict([release, allocation, release]) == [[release], [allocation], [release]]


def test_a_listing_within_the_limit_is_applied() -> None:
    assert find_loss_problem(listed=75, lost=25, pool=100, max_stale_fraction=0.25) is None


def test_a_listing_above_the_limit_is_held() -> None:
    problem = find_loss_problem(listed=74, lost=26, pool=100, max_stale_fraction=0.25)
    assert problem is not None
    assert "26 of 100" in problem
    assert "25%" in problem


def test_an_empty_listing_is_held_even_for_an_empty_pool() -> None:
    assert find_loss_problem(listed=0, lost=0, pool=0, max_stale_fraction=1) is not None


@pytest.mark.parametrize(
    ("discovered", "usual", "limit", "is_held"),
    [
        (50, 50, 1, False),
        (51, 50, 1, True),
        (20, 5, 0, False),
        (21, 5, 0, True),
        (500, 0, 0, False),
        (99, 1, None, False),
    ],
)
def test_a_listing_with_too_many_new_accounts_is_held(
    discovered: int, usual: int, limit: float | None, is_held: bool
) -> None:
    problem = find_growth_problem(discovered, usual, limit)
    assert (problem is not None) == is_held
    if problem is not None:
        assert f"{discovered} accounts" in problem


def test_the_first_listing_of_an_empty_pool_is_applied() -> None:
    assert find_loss_problem(listed=10, lost=0, pool=0, max_stale_fraction=0) is None
