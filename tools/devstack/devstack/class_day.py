"""Schedule of a demo day: five classes, the behaviour of each student, and incidents."""

import random
from collections.abc import Iterator
from dataclasses import dataclass

DAY_START_MIN, DAY_END_MIN = 8 * 60, 18 * 60
"""Minutes since midnight."""
ARRIVAL_MIN = 6
"""All students of a class arrive within this time."""
ABANDON_SHARE = 0.12
"""Share of students that close the browser without a release."""
REPEAT_SHARE = 0.2
"""Share of students that start the lab a second time. The broker must return the same sandbox."""


@dataclass(frozen=True, slots=True)
class Lesson:
    at_min: float
    track: str
    students: int
    shortest_min: float
    longest_min: float
    name_prefix: str | None = None
    """Prefix with a stock rule. Its students wait in line while the provisioner creates sandboxes."""


STOCK_PREFIX = "exam-"
LESSONS = (
    Lesson(8 * 60 + 20, "exam-401", 25, 20, 35, name_prefix=STOCK_PREFIX),
    Lesson(9 * 60, "dns-101", 40, 60, 110),
    Lesson(10 * 60 + 30, "security-201", 50, 60, 100),
    Lesson(13 * 60, "dns-101", 80, 50, 110),
    Lesson(15 * 60, "automation-301", 40, 40, 90),
)


@dataclass(frozen=True, slots=True)
class Student:
    name: str
    track: str
    name_prefix: str | None
    at_min: float
    stay_min: float
    releases: bool
    repeats_allocation: bool


@dataclass(frozen=True, slots=True)
class Incident:
    at_min: float
    method: str
    """Name of a method of `Player`."""
    text: str
    """Line for the terminal."""


INCIDENTS = (
    Incident(11 * 60 + 45, "fail_for_15_minutes", "CSP fails often for 15 minutes"),
    Incident(13 * 60 + 30, "add_accounts", "an administrator creates accounts in CSP"),
    Incident(14 * 60, "send_unreadable_message", "an unreadable message arrives"),
    Incident(16 * 60, "list_half", "CSP lists only half of its accounts"),
    Incident(16 * 60 + 40, "list_all", "CSP lists all accounts again"),
    Incident(17 * 60, "refuse_token", "CSP rejects the token of the broker"),
    Incident(17 * 60 + 20, "accept_token", "CSP accepts the token again"),
    Incident(17 * 60 + 30, "use_revoked_token", "a track uses a revoked token"),
)


def generate_students(day: int, chance: random.Random) -> Iterator[Student]:
    for number, lesson in enumerate(LESSONS, 1):
        for seat in range(1, lesson.students + 1):
            yield Student(
                name=f"day{day}-class{number}-student{seat}",
                track=lesson.track,
                name_prefix=lesson.name_prefix,
                at_min=lesson.at_min + ARRIVAL_MIN * chance.random() ** 2,  # most students arrive early
                stay_min=chance.uniform(lesson.shortest_min, lesson.longest_min),
                releases=chance.random() >= ABANDON_SHARE,
                repeats_allocation=chance.random() < REPEAT_SHARE,
            )


def format_time(minute: float) -> str:
    return f"{int(minute) // 60:02}:{int(minute) % 60:02}"
