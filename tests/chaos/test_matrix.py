"""Plans of short and long rounds."""

import random
from itertools import islice

from tests.chaos import matrix
from tests.chaos.faults import Fault
from tests.chaos.matrix import Step

ALL_FAULTS = matrix.list_faults(random.Random())
CLUSTER_FAULTS = matrix.list_faults(random.Random(), cluster=True)


def list_names(steps: list[Step]) -> list[tuple[str, ...]]:
    return [tuple(fault.name for fault in step) for step in steps]


def flatten(steps: list[Step]) -> list[Fault]:
    return [fault for step in steps for fault in step]


def test_fault_names_are_unique() -> None:
    for faults in (ALL_FAULTS, CLUSTER_FAULTS):
        assert len({fault.name for fault in faults}) == len(faults)


def test_a_cluster_loses_nodes_instead_of_servers() -> None:
    lost = {fault.name for fault in CLUSTER_FAULTS} - {fault.name for fault in ALL_FAULTS}
    assert {"RabbitMQ leader killed", "PostgreSQL primary frozen, standby promoted"} <= lost
    assert not {"RabbitMQ killed", "PostgreSQL killed"} & {fault.name for fault in CLUSTER_FAULTS}


def test_faults_of_nodes_are_paired_with_other_faults() -> None:
    steps = islice(matrix.plan_long_round(random.Random(1), cluster=True), 3 * len(CLUSTER_FAULTS))
    paired = {fault.name for step in steps if len(step) == 2 for fault in step}
    assert {fault.name for fault in CLUSTER_FAULTS} - {fault.name for fault in ALL_FAULTS} <= paired


def test_every_fault_is_repeated() -> None:
    steps = list(matrix.plan_repeated_round(random.Random(1), 3, "RabbitMQ leader", cluster=True))
    assert len(steps) == 3 * len({fault.name for fault in flatten(steps)}) == 3 * 4


def test_pairs_without_single_faults() -> None:
    words = "RabbitMQ leader,PostgreSQL primary"
    steps = list(matrix.plan_pairs(random.Random(1), 8, words, cluster=True))
    assert [len(step) for step in steps] == [2] * 8
    assert {fault.name for fault in flatten(steps)} == {
        fault.name for fault in CLUSTER_FAULTS if any(word in fault.name for word in words.split(","))
    }
    assert list(matrix.plan_pairs(random.Random(1), 8, "RabbitMQ leader", cluster=True)) == []


def test_short_round_has_one_fault_of_each_kind() -> None:
    kinds = [fault.kind for fault in flatten(matrix.plan_short_round(random.Random(1)))]
    assert sorted(kinds) == sorted({fault.kind for fault in ALL_FAULTS})


def test_long_round_starts_with_every_fault_alone() -> None:
    steps = list(islice(matrix.plan_long_round(random.Random(1)), 3 * len(ALL_FAULTS)))
    alone, pairs = steps[: len(ALL_FAULTS)], steps[len(ALL_FAULTS) :]
    assert sorted(list_names(alone)) == sorted((fault.name,) for fault in ALL_FAULTS)
    assert len([step for step in pairs if len(step) == 2]) > len(pairs) / 2
    assert len({frozenset(step) for step in list_names(pairs)}) > len(pairs) / 2


def test_paired_faults_affect_different_components() -> None:
    for seed in range(20):
        steps = [
            *matrix.plan_short_round(random.Random(seed)),
            *islice(matrix.plan_long_round(random.Random(seed)), 3 * len(ALL_FAULTS)),
        ]
        for one, other in (step for step in steps if len(step) == 2):
            assert not one.affects & other.affects


def test_seed_makes_a_round_repeatable() -> None:
    def plan_rounds(seed: int) -> list[tuple[str, ...]]:
        short, long = matrix.plan_short_round(random.Random(seed)), matrix.plan_long_round(random.Random(seed))
        return [*list_names(short), *list_names(list(islice(long, 3 * len(ALL_FAULTS))))]

    assert plan_rounds(1) == plan_rounds(1)
    assert plan_rounds(1) != plan_rounds(2)


def test_faults_are_selected_by_words_of_their_names() -> None:
    selected = flatten(matrix.plan_short_round(random.Random(1), "RabbitMQ killed,disk"))
    assert {fault.name for fault in selected} == {"RabbitMQ killed", "disk of PostgreSQL full"}
