"""Commands without their seconds of imports: forked, one process for each, from one that has imported everything.

A child is what `llava-sculpt WORDS` would be: own process group, own working folder, output into a file.
`python -m tests.attack.forks` is that process; it reads one JSON line for each request and answers with one.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.runs import BIN, ROOT

HOOK = Path(__file__).parent / "hook"
HANGS_AFTER = 240  # seconds
_NOT_LOADED = ("llava_sculpt.llava_patch", "llava_sculpt.tiny.pretraining")


@dataclass
class Running:
    """A command at work: `wait` gives its exit code (negative: the signal that ended it) and ends its group."""

    pid: int
    output_file: Path
    wait_for: Callable[[float], int]

    def wait(self, seconds: float = HANGS_AFTER) -> int:
        try:
            code = self.wait_for(seconds)
        finally:
            self.kill(group=True)
        return code

    def kill(self, group: bool = False) -> None:
        with suppress(ProcessLookupError):
            (os.killpg if group else os.kill)(self.pid, signal.SIGKILL)

    def output(self) -> str:
        return self.output_file.read_text(errors="replace")


def fresh(command: Sequence[str], folder: Path, output: Path, environment: dict[str, str]) -> Running:
    """Start a command as a user does, with a new interpreter."""
    with output.open("w") as stream:
        process = subprocess.Popen(
            command, cwd=folder, env=_environment(environment), stdout=stream, stderr=stream, start_new_session=True
        )

    def wait(seconds: float) -> int:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs: {' '.join(command)}") from None

    return Running(process.pid, output, wait)


def _environment(more: dict[str, str]) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if key not in ("DS_ACCELERATOR", "RANK")}
    own = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": f"{HOOK}:{ROOT}"}
    return {**kept, **own, "PATH": f"{BIN}:{os.environ['PATH']}", **more}


class Forks:
    """The process that has imported everything, as a context."""

    def __enter__(self) -> Forks:
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.attack.forks"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment({}),
            text=True,
        )
        started = time.monotonic()
        assert self._server.stdout is not None and self._server.stdout.readline()
        self.import_seconds = time.monotonic() - started
        return self

    def __exit__(self, *error: object) -> None:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.kill()
        self._server.wait()
        self._server.stdin.close()
        self._server.stdout.close()

    def start(self, words: Sequence[str], folder: Path, output: Path, environment: dict[str, str]) -> Running:
        """Start `llava-sculpt WORDS`."""
        request = {"words": list(words), "folder": str(folder), "output": str(output), "environment": environment}
        pid = self._ask(request)

        def wait(seconds: float) -> int:
            status = self._ask({"pid": pid, "seconds": seconds})
            assert status is not None, f"hangs: {' '.join(words)}"
            return os.waitstatus_to_exitcode(status)

        return Running(pid, output, wait)

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no answer
    import llava_sculpt.cli

    for module in pkgutil.walk_packages(llava_sculpt.__path__, "llava_sculpt."):
        if not module.name.startswith(_NOT_LOADED) and not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert len(os.listdir("/proc/self/task")) == 1, "only the thread that forks would be there in a child"
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _ended(**request) if "pid" in request else _fork(**request)
        print(json.dumps(answer), file=answers, flush=True)


def _ended(pid: int, seconds: float) -> int | None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return status
        time.sleep(0.005)
    return None


def _fork(words: list[str], folder: str, output: str, environment: dict[str, str]) -> int:
    pid = os.fork()
    if pid:
        return pid
    os.setsid()
    os.chdir(folder)
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, target in ((0, os.open(os.devnull, os.O_RDONLY)), (1, stream), (2, stream)):
        os.dup2(target, number)
    os.environ.update(environment)
    code: Any = 1
    try:
        from llava_sculpt.cli import main
        from tests.attack.killed import install

        if "ATTACK_FOLDER" in os.environ:
            install()
        code = main(words)
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else int(code is not None))


if __name__ == "__main__":
    _serve()
