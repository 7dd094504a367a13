"""A process that kills itself at one of its file-system events, chosen by its environment.

ATTACK_FOLDER: events on paths below it count. ATTACK_LOG: each is noted there, one a line. ATTACK_AT: number of the
event that kills, just before it takes place (from 1; in each process for itself). ATTACK_RANK: only in the process of
this rank. ATTACK_HOW: `process`, `group` (the whole process group) or a number: so many seconds after the event, at
which moment native code may be writing.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from typing import Any

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Of the arguments of an audit event: which are paths, and which is the folder's descriptor that each starts from.
_PATHS: Mapping[str, tuple[tuple[int, int | None], ...]] = {
    "open": ((0, None),),
    "os.rename": ((0, 2), (1, 3)),
    "os.remove": ((0, 1),),
    "os.mkdir": ((0, 2),),
    "os.rmdir": ((0, 1),),
    "os.chmod": ((0, 2),),
    "os.truncate": ((0, None),),
    "os.link": ((1, 3),),
    "os.symlink": ((1, 2),),
}


def install() -> None:
    """Begin to count in this process, and in what is forked from it."""
    folder, log, at = os.environ["ATTACK_FOLDER"], os.environ.get("ATTACK_LOG"), int(os.environ.get("ATTACK_AT", "0"))
    if os.environ.get("ATTACK_RANK", os.environ.get("RANK")) != os.environ.get("RANK"):
        at = 0
    count = 0

    def hook(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event not in _PATHS or (event == "open" and not _writes(args)):
            return
        found = [path for path in (_path(args, *place) for place in _PATHS[event]) if path.startswith(folder + os.sep)]
        if not found:
            return
        count += 1
        if log is not None:
            handle = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            line = f"{os.environ.get('RANK', '-')} {count} {event} {' '.join(p[len(folder) + 1 :] for p in found)}\n"
            os.write(handle, line.encode())
            os.close(handle)
        if count == at:
            _kill(os.environ.get("ATTACK_HOW", "process"))

    sys.addaudithook(hook)


def _kill(how: str) -> None:
    if how == "process":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "group":
        os.killpg(0, signal.SIGKILL)
    else:  # the kernel ends the process, whatever it is doing then
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, float(how))


def _writes(args: tuple[Any, ...]) -> bool:
    _, mode, flags = args
    return bool(set(mode) & set("wax+")) if isinstance(mode, str) else bool((flags or 0) & _WRITES)


def _path(args: tuple[Any, ...], place: int, start: int | None) -> str:
    path = args[place]
    if isinstance(path, int):
        return ""
    folder = args[start] if start is not None and start < len(args) else -1
    name = os.path.abspath(os.fsdecode(path))
    return name if folder in (-1, None) else os.path.join(os.readlink(f"/proc/self/fd/{folder}"), os.fsdecode(path))
