"""What a run shows to people: lines, and on a terminal one live line with a bar below them."""

import shutil
import sys
import textwrap
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from typing import Any, NoReturn, TextIO

from tqdm import tqdm


def say(text: str) -> None:
    """Prints lines: as they are for a pipe or a file, within its width on a terminal.

    There a word that is longer than the width, such as a path, stays whole, so that it can be copied.
    """
    if sys.stdout.isatty():
        wide = shutil.get_terminal_size().columns
        text = "\n".join(_within(line, wide) for line in text.split("\n"))
    tqdm.write(text)  # above a bar, if there is one
    sys.stdout.flush()


def _within(line: str, wide: int) -> str:
    """The line, folded."""
    return textwrap.fill(line, wide, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


class _Above:
    """A stream while a bar is shown: what others write to it, such as Ray, comes line by line above the bar."""

    def __init__(self, stream: TextIO, terminal: TextIO) -> None:
        """Args: stream: where the lines go; terminal: where the bar is."""
        self._stream, self._terminal, self._begun = stream, terminal, ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Keeps the beginning of a line until its end comes."""
        *lines, self._begun = (self._begun + text).split("\n")
        if lines:
            with tqdm.external_write_mode(file=self._terminal):
                self._stream.write("".join(f"{line}\n" for line in lines))
                self._stream.flush()
        return len(text)

    def end(self) -> None:
        """Writes what has no end of a line."""
        self._stream.write(self._begun)


class Bar:
    """The steps of a run: one live line on a terminal, else a line each time."""

    def __init__(self, steps: int) -> None:
        """Args: steps: of the whole run."""
        self._steps = steps
        self._bar: tqdm[NoReturn] | None = None
        self._streams = ExitStack()

    def show(self, done: int, line: str, brief: str) -> None:
        """Shows how far the run is.

        Args:
            done: steps done; fewer than before, if workers were lost.
            line: in full, for a pipe or a file.
            brief: what a terminal shows beside the bar; it is cut off at the terminal's width.
        """
        if not sys.stdout.isatty():
            say(line)
            return
        if self._bar is None:
            self._bar = tqdm(
                total=self._steps,
                file=sys.stdout,
                bar_format="step {n_fmt}/{total_fmt} |{bar}| {desc}",
                dynamic_ncols=True,
                leave=False,
            )
            self._redirect()
        self._bar.n = done
        self._bar.set_description_str(brief)

    def close(self) -> None:
        """Takes the live line away."""
        if self._bar is not None:
            self._bar.close()
            self._streams.close()

    def _redirect(self) -> None:
        """Has everybody's lines above the bar until it is closed."""
        for stream, redirect in ((sys.stderr, redirect_stderr), (sys.stdout, redirect_stdout)):
            above = _Above(stream, sys.stdout)
            self._streams.callback(above.end)
            self._streams.enter_context(redirect(above))  # type: ignore[arg-type]
