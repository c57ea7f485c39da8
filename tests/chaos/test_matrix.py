import random
from itertools import islice

from tests.chaos import matrix
from tests.chaos.faults import Fault
from tests.chaos.matrix import Step

EVERY = matrix.every(random.Random())


def names(steps: list[Step]) -> list[tuple[str, ...]]:
    return [tuple(fault.name for fault in step) for step in steps]


def all_of(steps: list[Step]) -> list[Fault]:
    return [fault for step in steps for fault in step]


def test_names_are_unique() -> None:
    assert len({fault.name for fault in EVERY}) == len(EVERY)


def test_a_short_round_has_one_fault_of_each_kind() -> None:
    kinds = [fault.kind for fault in all_of(matrix.short(random.Random(1)))]
    assert sorted(kinds) == sorted({fault.kind for fault in EVERY})


def test_a_long_round_has_every_fault_alone_before_there_are_pairs() -> None:
    steps = list(islice(matrix.long(random.Random(1)), 3 * len(EVERY)))
    alone, pairs = steps[: len(EVERY)], steps[len(EVERY) :]
    assert sorted(names(alone)) == sorted((fault.name,) for fault in EVERY)
    assert len([step for step in pairs if len(step) == 2]) > len(pairs) / 2
    assert len({frozenset(step) for step in names(pairs)}) > len(pairs) / 2


def test_two_faults_at_a_time_are_of_different_things() -> None:
    for seed in range(20):
        steps = [*matrix.short(random.Random(seed)), *islice(matrix.long(random.Random(seed)), 3 * len(EVERY))]
        for one, other in (step for step in steps if len(step) == 2):
            assert not one.touches & other.touches


def test_a_seed_repeats_a_round() -> None:
    def rounds(seed: int) -> list[tuple[str, ...]]:
        short, long = matrix.short(random.Random(seed)), matrix.long(random.Random(seed))
        return [*names(short), *names(list(islice(long, 3 * len(EVERY))))]

    assert rounds(1) == rounds(1)
    assert rounds(1) != rounds(2)


def test_faults_are_chosen_by_parts_of_their_names() -> None:
    chosen = all_of(matrix.short(random.Random(1), "RabbitMQ killed,disk"))
    assert {fault.name for fault in chosen} == {"RabbitMQ killed", "disk of PostgreSQL full"}
