"""Errors of devstack for its user."""


class CannotRun(Exception):
    """`make run` cannot start or continue. The message is one line and names the remedy.

    Exit status 2: the user must set or install something. Exit status 1: a started component has failed.
    """

    def __init__(self, line: str, *, status: int = 2) -> None:
        super().__init__(line)
        self.status = status
