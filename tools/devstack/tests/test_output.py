import io
import os

from devstack.output import Terminal


def test_each_line_starts_with_who_wrote_it() -> None:
    stream = io.BytesIO()
    terminal = Terminal(stream, colours=False, width=8)

    terminal.print_log_line("gateway", "listening")
    terminal.print_log_line("reaper", "idle")

    assert stream.getvalue().decode() == "gateway │ listening\nreaper  │ idle\n"


def test_colours_are_for_terminals_only() -> None:
    plain, coloured = io.BytesIO(), io.BytesIO()

    Terminal(plain).print_log_line("gateway", "listening")
    Terminal(coloured, colours=True).print_log_line("gateway", "listening")

    assert b"\x1b[" not in plain.getvalue()
    assert coloured.getvalue().startswith(b"\x1b[")


def test_a_reader_that_is_gone_is_noticed_and_harmless() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "wb", buffering=0) as stream:
        terminal = Terminal(stream, colours=False)

        terminal.print_line("nobody hears this")
        terminal.print_line("nor this")

    assert terminal.lost.is_set()
