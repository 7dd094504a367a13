"""The quick ones of the repository's tests that are meant for a GPU (`make test-gpu` runs all): masks and resume."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from gpu_parts import NotRun
from gpu_parts.world import ROOT, World

TRAINING, RESUME = "tests/train/test_training.py", "tests/train/test_resume.py"
TESTS = [
    f"{TRAINING}::test_masked_entries_are_exactly_zero_and_kept_counts_exact",
    f"{TRAINING}::test_nothing_off_the_mask_after_any_step",
    f"{RESUME}::test_resumed_equals_uninterrupted",
]
ON_A_CPU = ["tests/sculpt/test_schedule.py"]


def cases(world: World) -> Iterator[dict[str, Any]]:
    if find_spec("pytest") is None:
        raise NotRun("pytest is not installed (make setup-dev)")
    asked = ON_A_CPU if world.tiny else ["--gpu", *TESTS]
    command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=", *asked]
    ended = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert ended.stdout is not None
    for line in ended.stdout:
        print(line, end="", flush=True)
        test, _, result = line.partition(" ")
        if "::" in test and result.split():
            yield {"table": "Tests", "case": test.partition("::")[2], "result": result.split()[0].lower()}
    if ended.wait():
        raise AssertionError(f"pytest ended with exit code {ended.returncode}; see the log")
