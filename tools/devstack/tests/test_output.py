import asyncio
import io
import os

from devstack.output import Terminal


class FlushCounter(io.BytesIO):
    flushes = 0

    def flush(self) -> None:
        self.flushes += 1


def test_each_line_starts_with_the_name_of_its_process() -> None:
    stream = io.BytesIO()
    terminal = Terminal(stream, colours=False, width=8)

    terminal.print_log_line("gateway", "listening")
    terminal.print_log_line("reaper", "idle")

    assert stream.getvalue().decode() == "gateway │ listening\nreaper  │ idle\n"


def test_only_terminals_get_colours() -> None:
    plain, coloured = io.BytesIO(), io.BytesIO()

    Terminal(plain).print_log_line("gateway", "listening")
    Terminal(coloured, colours=True).print_log_line("gateway", "listening")

    assert b"\x1b[" not in plain.getvalue()
    assert coloured.getvalue().startswith(b"\x1b[")


def test_a_closed_pipe_is_detected_without_an_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as stream:
        terminal = Terminal(stream, colours=False)

        terminal.print_line("first line")
        terminal.print_line("second line")

    assert terminal.lost.is_set()


async def test_lines_of_one_turn_of_the_event_loop_are_flushed_once() -> None:
    stream = FlushCounter()
    terminal = Terminal(stream)

    for _ in range(3):
        terminal.print_line("line")
    await asyncio.sleep(0)
    terminal.print_line("line of the next turn")
    await asyncio.sleep(0)

    assert stream.flushes == 2
