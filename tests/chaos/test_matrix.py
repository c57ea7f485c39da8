"""Plans of short and long rounds."""

import random
from itertools import islice

from tests.chaos import matrix
from tests.chaos.faults import Fault
from tests.chaos.matrix import Step

ALL_FAULTS = matrix.list_faults(random.Random())


def list_names(steps: list[Step]) -> list[tuple[str, ...]]:
    return [tuple(fault.name for fault in step) for step in steps]


def flatten(steps: list[Step]) -> list[Fault]:
    return [fault for step in steps for fault in step]


def test_fault_names_are_unique() -> None:
    assert len({fault.name for fault in ALL_FAULTS}) == len(ALL_FAULTS)


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
