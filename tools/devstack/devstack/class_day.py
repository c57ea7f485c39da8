"""A day with four classes, as a plan: who comes when, who leaves without giving back, what goes wrong."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

BEGINS_MIN, ENDS_MIN = 8 * 60, 18 * 60
"""Minutes since midnight."""
ARRIVING_MIN = 6
"""In which a class comes."""
LEAVES_BEHIND = 0.12
"""So many close the browser and give nothing back."""
ASKS_AGAIN = 0.2
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
    stays_min: float
    gives_back: bool
    asks_again: bool


@dataclass(frozen=True, slots=True)
class Incident:
    """`what` is a method of the player's."""

    at_min: float
    what: str
    told: str


INCIDENTS = (
    Incident(11 * 60 + 45, "fail_for_a_quarter", "CSP has a bad quarter of an hour"),
    Incident(13 * 60 + 30, "supply", "new accounts are made in CSP"),
    Incident(14 * 60, "send_nonsense", "a message comes that nobody can read"),
    Incident(16 * 60, "list_half", "CSP lists half of its accounts"),
    Incident(16 * 60 + 40, "list_all", "CSP lists all of them again"),
    Incident(17 * 60, "refuse_token", "CSP refuses our token"),
    Incident(17 * 60 + 20, "take_token", "CSP takes our token again"),
    Incident(17 * 60 + 30, "use_old_token", "a track uses a token that was taken back"),
)


def students(day: int, chance: random.Random) -> Iterator[Student]:
    for number, lesson in enumerate(LESSONS, 1):
        for seat in range(1, lesson.students + 1):
            yield Student(
                name=f"day{day}-class{number}-student{seat}",
                track=lesson.track,
                at_min=lesson.at_min + ARRIVING_MIN * chance.random() ** 2,  # most come at the beginning
                stays_min=chance.uniform(lesson.shortest_min, lesson.longest_min),
                gives_back=chance.random() >= LEAVES_BEHIND,
                asks_again=chance.random() < ASKS_AGAIN,
            )


def clock(minute: float) -> str:
    return f"{int(minute) // 60:02}:{int(minute) % 60:02}"
