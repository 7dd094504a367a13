"""A terminal for what a test runs, and what it shows in the end."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios
from collections.abc import Sequence


def shown(command: Sequence[str], columns: int, **environment: str) -> str:
    """What a process writes to a terminal that it has to itself, control sequences included."""
    control, far_end = pty.openpty()
    fcntl.ioctl(far_end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, columns, 0, 0))
    kept = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "LINES", "RANK", "NO_COLOR")}
    process = subprocess.Popen(
        command,
        stdin=far_end,
        stdout=far_end,
        stderr=far_end,
        env={**kept, "TERM": "xterm-256color", **environment},
        start_new_session=True,
    )
    os.close(far_end)
    written = b""
    try:
        while piece := os.read(control, 4096):
            written += piece
    except OSError:  # Linux's way to say that nobody writes any more
        pass
    finally:
        os.close(control)
        process.wait(60)
    return written.decode()


def screen(written: str, columns: int) -> list[str]:
    """The lines that stand on a terminal after all of this, from the first on."""
    lines, row, column = [""], 0, 0
    for code, letter, sign in re.findall(r"\x1b\[([\d;?]*)([A-Za-z])|(.)", written, re.DOTALL):
        if letter == "A":
            row -= int(code or 1)
        elif (code, letter) == ("2", "K"):
            lines[row] = ""
        elif sign == "\r":
            column = 0
        elif sign == "\n" or (sign and column == columns):
            row, column = row + 1, 0 if sign != "\n" else column
            lines += [""] * (row == len(lines))
        else:
            assert sign or letter == "m", f"not known here: {code}{letter}"
        if sign and sign not in "\r\n":
            lines[row] = lines[row][:column].ljust(column) + sign + lines[row][column + 1 :]
            column += 1
    return [line.rstrip() for line in lines]
