"""What can stand in the way, output so that the reader knows what to do."""


class CannotRun(Exception):
    """One line for the person at the terminal; the exit status says whose move it is.

    Status 2: something has to be set or installed first. Status 1: something that ran has failed.
    """

    def __init__(self, line: str, *, status: int = 2) -> None:
        super().__init__(line)
        self.status = status
