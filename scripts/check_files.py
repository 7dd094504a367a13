"""Lint what ruff does not read: every YAML and JSON parses, training configurations are valid, scripts are sound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import yaml

from llava_sculpt.config_reader import parse_config
from llava_sculpt.errors import UserError
from llava_sculpt.experiments.grid import method_values, read_grid, read_mapping
from llava_sculpt.names import SCALES, TARGETS

# A configuration is checked with these in place of what is generated or downloaded later.
_PRESENT = ["--model_name_or_path", ".", "--data_path", "pyproject.toml", "--image_folder", ".", "--output_dir", "x"]


def problems_of(path: Path) -> list[str]:
    """What is wrong with one tracked file."""
    try:
        if path.suffix in (".yaml", ".yml"):
            yaml.safe_load(path.read_text())
            if path.parts[:2] == ("configs", "grids"):
                for scale in (scale for scale in SCALES if scale in read_mapping(path)):
                    read_grid(str(path), scale)
            elif path.parts[:2] == ("configs", "values"):
                for task in TARGETS:
                    method_values(path.stem, task)
            elif path.parts[0] == "configs":
                # bf16 is refused where there is no hardware for it; deepspeed where it is not installed.
                parse_config(
                    ["--config", str(path), *_PRESENT, "--bf16", "False", "--deepspeed", "", "--tf32", "False"]
                )
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix == ".sh" or path == Path(".ci/run"):
            done = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
            return [f"{path}: {done.stderr.strip()}"] if done.returncode else []
    except UserError as error:
        return [f"{path}: {problem}" for problem in error.problems]
    except (yaml.YAMLError, ValueError) as error:
        return [f"{path}: {error}"]
    return []


def main() -> int:
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    problems = [problem for name in tracked for problem in problems_of(Path(name))]
    print("\n".join(problems) or f"{len(tracked)} files: YAML, JSON and shell scripts are sound")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
