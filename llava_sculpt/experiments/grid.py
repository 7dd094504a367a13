"""What is to be run: grid files, the values each method runs with, and an identity for every run.

A grid file (configs/grids/) has `title`, and under `paper`, `tiny` or both a list of entries. `split` (default test)
and `seed` (the first one, default 1) say what else is not as usual. An entry is a mapping from
`method`, `task` and further fields to a value or a list of values, and stands for all combinations:

    - {method: [lora, dare], task: [iconqa, coco], lora_r: [16, 32, 64]}

A run's settings are its method's YAML in configs/ (LoRASculpt's own, plain LoRA's for everything else), then what
configs/values/SCALE.yaml says of the method on that task, then what the grid says.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import math
import os
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from llava_sculpt.errors import UserError
from llava_sculpt.names import (
    DATA,
    EDITS,
    METHODS,
    SCALES,
    SOURCES,
    TARGETS,
    ZERO_SHOT,
    config_file,
    is_target,
    recipe_of,
    shipped,
)
from llava_sculpt.ranges import out_of_range
from llava_sculpt.yaml_reader import read_yaml

SPLITS = ("val", "test")
ANY_TASK = "all"  # of the zero-shot run, which serves both Targets
GRIDS = Path("configs/grids")
VALUES = Path("configs/values")

# Where a run is written, what it starts from (recorded with the result as hashes) and how it is split over devices.
_NOT_IDENTITY = frozenset(
    """
    output_dir save_steps save_total_limit logging_steps report_to model_name_or_path data_path image_folder deepspeed
    dataloader_num_workers activation_checkpointing per_device_train_batch_size gradient_accumulation_steps
    forgetting_probe
    """.split()
)
_PAPER_BATCH = 16  # on any number of GPUs
_MOST_RUNS = 10_000  # of one entry of a grid
# What a run reads and where it writes follow from scale and task: its identity does not hold them.
_NOT_SET_HERE = ("output_dir", "model_name_or_path", "data_path", "image_folder")
_BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Run:
    """One result to have: a method trained (or LoRA trained and edited) on a task with one seed, scored on a split.

    Args:
        settings: all fields of the training configuration but the seed; () for zero-shot.
        edit: fields of the edit; () for a run that is only trained.
        seed: None for zero-shot.
    """

    scale: str
    task: str
    method: str
    split: str
    seed: int | None
    settings: Settings = ()
    edit: Settings = ()

    @property
    def trained_method(self) -> str:
        """The method that training runs with: LoRA for an edit."""
        return "lora" if self.method in EDITS else self.method

    @property
    def parent(self) -> Run | None:
        """The LoRA run whose adapter this run edits."""
        return replace(self, method="lora", edit=()) if self.method in EDITS else None

    @property
    def tasks(self) -> list[str]:
        """What the run is scored on."""
        return [*TARGETS, *SOURCES] if self.task == ANY_TASK else [self.task, *SOURCES]

    @property
    def targets(self) -> list[str]:
        return list(TARGETS) if self.task == ANY_TASK else [self.task]

    def setting(self, name: str) -> Any:
        """Value of a field of training or edit, None where the method has none such."""
        return dict((*self.settings, *self.edit)).get(name)

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the result. Fields without effect are left out, so that equal runs are found equal."""
        return {**self.trained_identity, "method": self.method, "edit": dict(self.edit), "split": self.split}

    @property
    def trained_identity(self) -> dict[str, Any]:
        """All that decides the adapter before any edit and scoring."""
        return {
            "scale": self.scale,
            "task": self.task,
            "method": self.trained_method,
            "seed": self.seed,
            "settings": _effective(self.scale, self.trained_method, dict(self.settings)),
        }

    @property
    def name(self) -> str:
        """Name of the result file: for a person, made unique by a hash of the identity."""
        split = [] if self.split == "test" else [self.split]
        return "_".join([*self._words, *split, identity_hash(self.identity)])

    @property
    def adapter_name(self) -> str:
        """Name of the adapter's folder, the same for all splits."""
        return "_".join([*self._words, identity_hash({**self.trained_identity, "edit": [self.method, *self.edit]})])

    @property
    def _words(self) -> list[str]:
        if self.seed is None:
            return [self.method]
        return [self.task, self.method, f"r{self.setting('lora_r')}", f"seed{self.seed}"]

    @property
    def config_file(self) -> Path:
        """The YAML that training starts from."""
        return config_file(self.scale, self.task, self.trained_method)

    def train_flags(self) -> list[str]:
        """The flags of training that change its YAML into this run's settings."""
        of_yaml = read_mapping(self.config_file)
        flags = ["--method", self.trained_method, "--seed", str(self.seed)]
        for key, value in self.settings:
            if of_yaml.get(key) != value:
                flags += [f"--{key}", str(value)]
        return flags


@dataclass(frozen=True)
class Grid:
    """The runs of one grid file at one scale, without repetition. `name` is the file's."""

    name: str
    title: str
    runs: list[Run]


def read_grid(name_or_file: str, scale: str, split: str | None = None, seeds: int = 1) -> Grid:
    """Read configs/grids/NAME.yaml, or the file given by its path.

    Args:
        split: val or test; by default the file's `split`, or test.
        seeds: how many, from the file's `seed` on (default 1).

    Raises:
        UserError: everything that is wrong with the file.
    """
    if seeds > _MOST_RUNS:
        raise UserError(f"--seeds: at most {_MOST_RUNS:,}, got {seeds}")
    file = Path(name_or_file) if name_or_file.endswith(".yaml") else GRIDS / f"{name_or_file}.yaml"
    if not os.path.isfile(shipped(file)):
        near = difflib.get_close_matches(file.stem, [known.stem for known in Path(shipped(GRIDS)).glob("*.yaml")], n=1)
        raise UserError(f"{file}: no such grid" + (f"; did you mean {near[0]}?" if near else ""))
    content = read_mapping(file)
    problems = [f"{file}: unknown key {key}" for key in content if key not in ("title", "seed", "split", *SCALES)]
    problems += [f"{file}: needs the key {key}" for key in ("title", scale) if key not in content]
    split = split or content.get("split", "test")
    if split not in SPLITS:
        problems.append(f"{file}: split: {split!r} is neither val nor test")
    first = content.get("seed", 1)
    if wrong := out_of_range(first, int, f"[0, {2**32 - seeds}]"):
        problems.append(f"{file}: seed: {wrong}")
        first = 1
    if not isinstance(content.get("title", ""), str):
        problems.append(f"{file}: title: must be text, got {content['title']!r:.60}")
    entries = content.get(scale) or []
    if not isinstance(entries, list):
        problems.append(f"{file}: {scale}: must be a list of entries")
        entries = []
    runs: dict[str, Run] = {}
    for number, entry in enumerate(entries, 1):
        where = f"{file}: {scale}, entry {number}"
        for chosen in _combinations(where, entry, problems):
            for run in _runs_of(where, scale, str(split), chosen, problems):
                for seed in [None] if run.seed is None else range(first, first + seeds):
                    found = replace(run, seed=seed)
                    runs.setdefault(found.name, found)
    if scale in content and not entries:
        problems.append(f"{file}: {scale}: lists no run")
    if problems:
        raise UserError(list(dict.fromkeys(problems)))
    return Grid(file.stem, str(content["title"]), list(runs.values()))


def _combinations(where: str, entry: Any, problems: list[str]) -> list[dict[str, Any]]:
    if not isinstance(entry, dict) or "method" not in entry:
        problems.append(f"{where}: needs `method` and what it runs with")
        return []
    lists = {key: value if isinstance(value, list) else [value] for key, value in entry.items()}
    problems += [f"{where}: {key}: an empty list" for key, values in lists.items() if not values]
    if math.prod(map(len, lists.values())) > _MOST_RUNS:
        problems.append(f"{where}: stands for more than {_MOST_RUNS:,} runs")
        return []
    return [dict(zip(lists, values, strict=True)) for values in itertools.product(*lists.values())]


def _runs_of(where: str, scale: str, split: str, chosen: dict[str, Any], problems: list[str]) -> list[Run]:
    """The run of one combination, its seed to be replaced; [] and problems if there is none."""
    method, task = chosen.pop("method"), chosen.pop("task", None)
    if not isinstance(method, str) or method not in METHODS:
        problems.append(f"{where}: method: {method!r:.60} is not one of {', '.join(METHODS)}")
        return []
    if method == ZERO_SHOT:
        problems += [f"{where}: {key}: zero_shot has no settings" for key in chosen]
        return [Run(scale, ANY_TASK, method, split, None)]
    if task not in TARGETS and not (isinstance(task, str) and is_target(task) and (DATA[scale] / task).is_dir()):
        own = f"nor a task of your own that is prepared in {DATA[scale]}"
        problems.append(f"{where}: task: {task!r:.60} is not one of {', '.join(TARGETS)}, {own}")
        return []
    run = Run(scale, task, method, split, 0)
    known = {key: value for key, value in read_mapping(run.config_file).items() if key not in ("method", "seed")}
    values = method_values(scale, task)
    training = {**known, **values.get(run.trained_method, {})}
    edit = {key: value for key, value in values.get(method, {}).items() if method in EDITS}
    fields = {**dict.fromkeys(known), **METHODS[method].fields}
    for key, value in chosen.items():
        if key not in fields or key in _NOT_SET_HERE:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]}?" if near and near[0] != key else ""
            problems.append(f"{where}: {key}: not a setting of {method} ({run.config_file}){hint}")
        elif key in known and _is_number(known[key]) and not _is_number(value):
            problems.append(f"{where}: {key}: {value!r:.60} is not a number")
        elif value is None or isinstance(value, (list, dict)):
            problems.append(f"{where}: {key}: must be one value, got {value!r:.60}")
        elif method in EDITS and key in METHODS[method].fields:
            edit[key] = value
        else:
            training[key] = value
    given = {**training, **edit}
    numbers = {**METHODS[method].fields, **dict.fromkeys(_BATCH, (int, "[1, inf)"))}
    for key, (kind, interval) in numbers.items():
        if key in given and (wrong := out_of_range(given[key], kind, interval)):
            problems.append(f"{where}: {key}: {wrong}")
    missing = [key for key in METHODS[method].fields if key not in given]
    if method in EDITS and missing:
        problems.append(f"{where}: {method}: needs {', '.join(missing)}, here or in {VALUES / scale}.yaml")
    return [replace(run, settings=tuple(sorted(training.items())), edit=tuple(sorted(edit.items())))]


def method_values(scale: str, task: str) -> dict[str, dict[str, Any]]:
    """configs/values/SCALE.yaml, the part of a task (one's own: IconQA's): method -> field -> value.

    Raises:
        UserError: a task or method that may not stand there.
    """
    file = VALUES / f"{scale}.yaml"
    content = read_mapping(file)
    problems = [f"{file}: {key}: not one of {', '.join(TARGETS)}" for key in content if key not in TARGETS]
    task = recipe_of(task)
    found = content.get(task) or {}
    if not isinstance(found, dict):
        raise UserError(f"{file}: {task}: must be `method: values` lines")
    for method, values in found.items():
        where = f"{file}: {task}: {method}"
        if method in ("lora", "sculpt"):
            problems.append(f"{where}: its values belong in {config_file(scale, task, method)}")
        elif method not in METHODS:
            problems.append(f"{file}: {task}: {method!r} is not one of {', '.join(METHODS)}")
        elif not isinstance(values, dict):
            problems.append(f"{where}: must be `field: value` lines")
        else:
            fields = METHODS[method].fields
            extra = [key for key in values if key in _NOT_SET_HERE or (method in EDITS and key not in fields)]
            problems += [f"{where}: {key}: not a field of this {METHODS[method].kind}" for key in extra]
            for key, value in values.items():
                if value is None or isinstance(value, (list, dict)):
                    problems.append(f"{where}: {key}: must be one value, got {value!r:.60}")
                elif key in fields and (wrong := out_of_range(value, *fields[key])):
                    problems.append(f"{where}: {key}: {wrong}")
    if problems:
        raise UserError(problems)
    return found


def read_mapping(file: Path) -> dict[str, Any]:
    """A YAML file with `key: value` at its top level, `shipped` or not.

    Raises:
        UserError: as `read_yaml`.
    """
    try:
        place = Path(shipped(file))
        return _parse(place, place.stat().st_mtime_ns)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error


@lru_cache(maxsize=256)
def _parse(file: Path, modified: int) -> dict[str, Any]:
    """Parsing is the slow part of planning: a grid of 100 runs asks for the same YAML hundreds of times."""
    return read_yaml(file)


def _effective(scale: str, method: str, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that change what is trained."""
    if not settings:
        return {}
    batch = settings.get("per_device_train_batch_size", 8) * settings.get("gradient_accumulation_steps", 1)
    without = set(_NOT_IDENTITY)
    connector = settings.get("connector")
    if connector != "full":
        without.add("mm_projector_lr")
    if "reg_lambda" not in METHODS[method].fields:
        without.add("reg_lambda")
    if method != "sculpt":
        without |= {key for key in settings if key.startswith("sculpt_")}
    else:
        if connector != "sculpt":
            without.add("sculpt_beta")
            if settings.get("sculpt_alpha") == 0:
                without |= {"sculpt_omega", "sculpt_reduction"}
        if settings.get("sculpt_density") == 1:
            without.add("sculpt_warmup_steps")
    kept = {key: value for key, value in settings.items() if key not in without | {"method", "seed"}}
    return {**kept, "global_batch_size": batch if scale == "tiny" else _PAPER_BATCH}


def identity_hash(identity: dict[str, Any]) -> str:
    """What ends the name of a run."""
    return hashlib.sha256(json.dumps(_plain(identity), sort_keys=True).encode()).hexdigest()[:10]


def _plain(value: Any) -> Any:
    """3 and 3.0 are one number."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return float(value) if _is_number(value) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
