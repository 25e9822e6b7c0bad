"""Lines of a run in a pipe and on a real terminal, a pty."""

import os
import pty
import re
import struct
import subprocess
import sys
import termios
from fcntl import ioctl

from tests.docs import ROOT

PATH = "/data/" + "x" * 50
SCRIPT = f"""
import sys
from pipeline.cluster.terminal import Bar, say
say("one thought of a few words that is wider than the terminal\\nresults in {PATH}")
bar = Bar(900)
bar.show(1, "step 1/900  in full", "loss 4.5  eta of what is far too wide for so few columns")
bar.show(450, "step 450/900  in full", "loss 2.5")
print("(raylet) half a line, ", end="")
print("and its end")
print("on the other stream", file=sys.stderr)
say("resuming from step 300")
bar.show(300, "step 300/900  in full", "loss 3.5")
bar.close()
say("the end")
"""


def _piped() -> str:
    return subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def _on_a_terminal(columns: int) -> str:
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    values = {key: value for key, value in os.environ.items() if key != "COLUMNS"}
    child = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=ROOT, stdout=theirs, stderr=theirs, env=values)
    os.close(theirs)
    said = b""
    try:
        while part := os.read(ours, 4096):
            said += part
    except OSError:  # Linux: the other end is closed
        pass
    os.close(ours)
    assert child.wait() == 0, said
    return said.decode()


def test_a_pipe_gets_every_line_in_full() -> None:
    assert _piped().splitlines() == [
        "one thought of a few words that is wider than the terminal",
        f"results in {PATH}",
        "step 1/900  in full",
        "step 450/900  in full",
        "(raylet) half a line, and its end",
        "resuming from step 300",
        "step 300/900  in full",
        "the end",
    ]


def test_a_terminal_gets_one_live_line_and_none_beyond_its_width() -> None:
    said = _on_a_terminal(40)
    shown = [part for part in re.split(r"[\r\n]+", said) if part.strip()]
    assert [part for part in shown if len(part) > 40] == [f"  {PATH}"]  # a path stays whole
    assert "in full" not in said
    assert re.search(r"step 450/900 \|\W+\| loss 2\.5", said)
    assert "step 300/900" in said
    lines = [line.rpartition("\r")[2].strip() for line in said.replace("\r\n", "\n").split("\n")]
    assert lines[-5:-3] == ["(raylet) half a line, and its end", "on the other stream"], "not in the live line"
    assert lines[-3:] == ["resuming from step 300", "the end", ""], "the live line is gone"
