"""Schedule of the demo day."""

import random

from devstack import class_day
from devstack.class_day import DAY_END_MIN, DAY_START_MIN, INCIDENTS, LESSONS
from devstack.demo import ACCOUNTS, STOCK_POLICY, Player


def test_every_student_arrives_and_leaves_within_the_day() -> None:
    students = list(class_day.generate_students(1, random.Random(1)))

    assert len({student.name for student in students}) == sum(lesson.students for lesson in LESSONS)
    assert all(
        DAY_START_MIN < student.at_min < student.at_min + student.stay_min < DAY_END_MIN for student in students
    )


def test_some_students_leave_without_a_release() -> None:
    students = list(class_day.generate_students(1, random.Random(1)))

    assert 0 < sum(not student.releases for student in students) < len(students) / 2


def test_the_pool_is_too_small_for_the_day() -> None:
    students = [lesson.students for lesson in LESSONS if lesson.name_prefix is None]
    assert sum(students[:3]) > ACCOUNTS


def test_the_first_class_arrives_at_a_nearly_empty_stock() -> None:
    rule = STOCK_POLICY["stock"]
    assert isinstance(rule, dict)
    assert LESSONS[0].name_prefix == rule["name_prefix"]
    assert rule["min"] < LESSONS[0].students < rule["max"]


def test_every_incident_is_a_method_of_the_player() -> None:
    assert all(callable(getattr(Player, incident.method)) for incident in INCIDENTS)
    assert all(DAY_START_MIN < incident.at_min < DAY_END_MIN for incident in INCIDENTS)
