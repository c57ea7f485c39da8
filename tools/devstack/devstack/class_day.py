"""A day with four classes, as a plan: who comes when, who leaves without giving back, what goes wrong."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

DAY_START_MIN, DAY_END_MIN = 8 * 60, 18 * 60
"""Minutes since midnight."""
ARRIVAL_MIN = 6
"""In which a class comes."""
ABANDON_SHARE = 0.12
"""So many close the browser and give nothing back."""
REPEAT_SHARE = 0.2
"""So many start their lab once more, and are to get the sandbox they have."""


@dataclass(frozen=True, slots=True)
class Lesson:
    at_min: float
    track: str
    students: int
    shortest_min: float
    longest_min: float


LESSONS = (
    Lesson(9 * 60, "dns-101", 40, 60, 110),
    Lesson(10 * 60 + 30, "security-201", 50, 60, 100),
    Lesson(13 * 60, "dns-101", 80, 50, 110),
    Lesson(15 * 60, "automation-301", 40, 40, 90),
)


@dataclass(frozen=True, slots=True)
class Student:
    name: str
    track: str
    at_min: float
    stay_min: float
    releases: bool
    repeats_allocation: bool


@dataclass(frozen=True, slots=True)
class Incident:
    """`what` is a method of the player's."""

    at_min: float
    method: str
    text: str


INCIDENTS = (
    Incident(11 * 60 + 45, "fail_for_15_minutes", "CSP has a bad quarter of an hour"),
    Incident(13 * 60 + 30, "add_accounts", "new accounts are made in CSP"),
    Incident(14 * 60, "send_unreadable_message", "a message comes that nobody can read"),
    Incident(16 * 60, "list_half", "CSP lists half of its accounts"),
    Incident(16 * 60 + 40, "list_all", "CSP lists all of them again"),
    Incident(17 * 60, "refuse_token", "CSP refuses our token"),
    Incident(17 * 60 + 20, "accept_token", "CSP takes our token again"),
    Incident(17 * 60 + 30, "use_revoked_token", "a track uses a token that was taken back"),
)


def generate_students(day: int, chance: random.Random) -> Iterator[Student]:
    for number, lesson in enumerate(LESSONS, 1):
        for seat in range(1, lesson.students + 1):
            yield Student(
                name=f"day{day}-class{number}-student{seat}",
                track=lesson.track,
                at_min=lesson.at_min + ARRIVAL_MIN * chance.random() ** 2,  # most come at the beginning
                stay_min=chance.uniform(lesson.shortest_min, lesson.longest_min),
                releases=chance.random() >= ABANDON_SHARE,
                repeats_allocation=chance.random() < REPEAT_SHARE,
            )


def format_time(minute: float) -> str:
    return f"{int(minute) // 60:02}:{int(minute) % 60:02}"
