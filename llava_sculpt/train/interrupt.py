"""Ctrl-C and TERM where there is no step to finish: one line, and the process ends. Quick to import."""

from __future__ import annotations

import os
import signal
from typing import Any

INTERRUPTED = 130  # the shell's exit code for ctrl-C


def exit_on_signals() -> None:
    """From now on ctrl-C and TERM end this process at once, with one line and exit code 130.

    For a script's own process, before it imports torch. Nothing is unwound, so that no library prints a traceback or
    loses the interruption: what is on disk is as after a kill, from which the same command continues.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _exit)


def _exit(number: int, frame: Any) -> None:
    os.write(2, b"\ninterrupted; give the same command again to continue\n")
    os._exit(INTERRUPTED)
