"""Configurations, command lines, grids and DeepSpeed's JSON made wrong: refused with the key, or read as they say."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from llava_sculpt.cli import main
from llava_sculpt.config import RANGES, Config
from llava_sculpt.config_reader import _fields, parse_config
from llava_sculpt.experiments.grid import read_grid
from llava_sculpt.memory.plan import zero_stage
from llava_sculpt.ranges import out_of_range
from tests.attack.attack import _ODD, break_file, mutate_json_file, mutated, outcome

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml")) + sorted((ROOT / "configs" / "tiny").glob("*.yaml"))
ODD_YAML = [
    *("010", "1:30", "1e-3", "0x10", ".inf", "-.inf", ".nan", "null", "~", "yes", "no", "2026-01-02", "!!int 3", "*x"),
    *(
        "&x 3",
        "[1, 2]",
        "[8]",
        "{a: 1}",
        "'8'",
        "8.5",
        "-8",
        "9" * 400,
        "1_0",
        "",
        "<<",
        "@",
        "|",
        "[" * 400,
        "\t",
        "\0",
    ),
    *("'\\ud800'", '"\\ud800"', "é", "a: b", "- 1", "#", "!!python/object:os.system x", "1e999", "0", "-0.0"),
]
WORDS = [str(odd) for odd in (*_ODD, *ODD_YAML) if isinstance(odd, (str, int, float))]
FLAGS = sorted(_fields().keys() - {"local_rank"})  # which launchers pass: nobody reads it


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Training arguments may set variables."""
    before = dict(os.environ)
    yield
    for key in os.environ.keys() - before.keys():
        del os.environ[key]
    os.environ.update(before)


def into(found: list[Any], call: Callable[..., Any], *arguments: Any, **options: Any) -> None:
    found.append(call(*arguments, **options))


def held(config: Config, name: str) -> Any:
    part = next(part for part in (config.model, config.data, config.sculpt, config.training) if hasattr(part, name))
    value = getattr(part, name)
    return getattr(value, "value", value)


def agrees(name: str, given: Any, config: Config) -> bool:
    """Whether a configuration holds what was given, of the field's type and in its range."""
    value, field = held(config, name), _fields()[name]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (not math.isfinite(value) or out_of_range(value, float, RANGES.get(name, "(-inf, inf)"))):
        return False
    if name in (
        "report_to",
        "debug",
        "dataloader_pin_memory",
        "do_eval",
        "eval_steps",
        "disable_tqdm",
        "use_cpu",
        "tf32",
    ):
        return True  # completed from others
    if name.startswith("gradient_checkpointing") or name == "metric_for_best_model":
        return True
    if isinstance(given, dict) or (isinstance(given, str) and given.startswith("{") and dict in field.kinds):
        return value == (json.loads(given) if isinstance(given, str) else given)
    if isinstance(given, list) or given in (None, ""):
        return value == (given or None) or name == "accelerator_config"  # filled with accelerate's defaults
    if bool in field.kinds:
        return str(given).lower() in (("yes", "true", "t", "y", "1") if value else ("no", "false", "f", "n", "0"))
    if number:
        return float(given) == value and not isinstance(given, bool)
    if name == "output_dir":
        given = os.path.expanduser(given)
    return given == value or (given is False and value == "no")


def check(argv: list[str], given: dict[str, Any], what: str, names: set[str]) -> None:
    """Refused with the name of what is wrong, or read as it says."""
    found: list[Config] = []
    result = outcome(lambda: into(found, parse_config, argv, elsewhere=True))
    if found:
        wrong = [name for name, value in given.items() if not agrees(name, value, found[0])]
        assert not wrong, (what, [(name, given[name], held(found[0], name)) for name in wrong])
    else:
        assert result.code == 2 and result.lines and all(line.strip() for line in result.lines), what
        text = "\n".join(result.lines)
        assert any(name in text for name in names), (what, text)
        assert all(len(line) < 1000 for line in result.lines), (what, text[:3000])


def test_configuration_files(tries: Iterator[random.Random], tmp_path: Path) -> None:
    """Values, keys, structure and bytes of the repository's own."""
    file = tmp_path / "config.yaml"
    originals = [yaml.safe_load(path.read_text()) for path in CONFIGS]
    for rng in tries:
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        number = rng.randrange(len(CONFIGS))
        lines, names = CONFIGS[number].read_text().splitlines(), {str(file)}
        kind = rng.randrange(4)
        if kind == 0:  # a value, of any field
            content = dict(originals[number])
            name = rng.choice(FLAGS)
            content[name] = rng.choice([mutated(rng, content.get(name, 1))[0], rng.choice(_ODD)])
            file.write_text(json.dumps(content) if rng.random() < 0.5 else yaml.safe_dump(content, allow_unicode=True))
            names, what = {name}, f"{name}: {content[name]!r:.60}"
        elif kind == 1:  # text of a value
            place = rng.choice([i for i, line in enumerate(lines) if line and not line.startswith("#")])
            key = lines[place].partition(":")[0]
            lines[place] = f"{key}: {rng.choice(ODD_YAML)}"
            what, names = lines[place], names | {key}
            file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        elif kind == 2:  # lines
            place, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            what = rng.choice(["twice", "indent", "rename", "join"])
            if what == "twice":
                lines.insert(other, lines[place])
            elif what == "indent":
                lines[place] = "  " + lines[place]
            elif what == "rename":
                lines[place] = "x" + lines[place]
            else:
                lines[place : place + 2] = ["".join(lines[place : place + 2])]
            file.write_text("\n".join(lines))
            names |= {lines[min(place, len(lines) - 1)].partition(":")[0].strip() or str(file), "required"}
            what = f"{what}: line {place}, {other}"
        else:
            shutil.copy(CONFIGS[number], file)
            what, names = break_file(rng, file), names | {"config"}
        given = {}
        if file.is_file():
            with suppress(Exception):  # it is for the reader to say so
                given = yaml.load(file.read_text(encoding="utf-8"), PlainLoader)
        if kind == 3 and file.is_file():  # a changed byte may be any text
            names |= {"required", "must", "unknown", "not"}
        given = {key: value for key, value in given.items() if key in _fields()} if isinstance(given, dict) else {}
        check(["--config", str(file)], given, what, names | set(given))


class PlainLoader(yaml.BaseLoader):
    """Every scalar is its text, and a mapping or list the plain one: what a reader of the file sees."""


def plain_scalar(loader: yaml.BaseLoader, node: yaml.ScalarNode) -> Any:
    text = node.value
    if node.style is None and text.lower() in ("null", "~", ""):
        return None
    if node.style is None and text.lower() in ("on", "off"):
        return text.lower() == "on"
    return text


PlainLoader.add_constructor("tag:yaml.org,2002:str", plain_scalar)


def test_command_lines(tries: Iterator[random.Random]) -> None:
    for rng in tries:
        argv, given, names = ["--config", str(rng.choice(CONFIGS))], {}, {"command line"}
        for _ in range(rng.choice([1, 1, 1, 2, 3])):
            name = rng.choice(FLAGS)
            flag = name.replace("_", "-") if rng.random() < 0.1 else name
            flag = rng.choice([flag, flag, flag, flag, flag + "s", f"no_{flag}", flag[:-1], "config"])
            values = rng.choice([[], [rng.choice(WORDS)], [rng.choice(WORDS)], rng.sample(WORDS, 2)])
            argv += [f"--{flag}={values[0]}"] if len(values) == 1 and rng.random() < 0.3 else [f"--{flag}", *values]
            names |= {name, flag}
            if flag.replace("-", "_") == name and len(values) == 1 and not values[0].startswith("--"):
                given[name] = values[0]
        check(argv, given, " ".join(argv), names)


def test_grids(tries: Iterator[random.Random], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid file, the values and the configuration that it builds on: refused, or every run's numbers in range."""
    monkeypatch.chdir(tmp_path)
    fields = {"keep": "(0, 1]", "samples": "[1, inf)", "drop": "[0, 1)", "density": "(0, 1]", "reg_lambda": "[0, inf)"}
    for rng in tries:
        shutil.rmtree("configs", ignore_errors=True)
        shutil.copytree(ROOT / "configs", "configs")
        scale = rng.choice(["tiny", "paper"])
        name = rng.choice([path.stem for path in Path("configs/grids").glob("*.yaml")])
        file = Path(
            rng.choice([f"configs/grids/{name}.yaml", f"configs/values/{scale}.yaml", "configs/tiny/iconqa_lora.yaml"])
        )
        if rng.random() < 0.2:
            what = break_file(rng, file)
        else:
            content, what = mutated(rng, yaml.safe_load(file.read_text()))
            file.write_text(json.dumps(content) if rng.random() < 0.5 else yaml.safe_dump(content))
        found: list[Any] = []
        result = outcome(partial(into, found, read_grid, name, scale))
        assert found or (result.code == 2 and all(".yaml" in line for line in result.lines)), (what, result.lines)
        for run in found[0].runs if found else ():
            for key, value in (*run.settings, *run.edit):
                if key in fields:
                    assert not out_of_range(value, float, fields[key]), (what, key, value)
                    assert key != "samples" or isinstance(value, int)


def test_deepspeed_json(tries: Iterator[random.Random], tmp_path: Path) -> None:
    originals = sorted((ROOT / "configs").glob("zero*.json"))
    file = tmp_path / "zero.json"
    for rng in tries:
        if file.is_dir():
            file.rmdir()
        file.unlink(missing_ok=True)
        shutil.copy(rng.choice(originals), file)
        what = break_file(rng, file) if rng.random() < 0.3 else mutate_json_file(rng, file)
        stage: list[int | None] = []
        result = outcome(partial(into, stage, zero_stage, str(file)))
        assert stage or (result.code == 2 and all(str(file) in line for line in result.lines)), (what, result.lines)
        if stage:
            found = json.loads(file.read_text()).get("zero_optimization", {}).get("stage", 0)
            assert type(found) is int and found >= 0 and stage == [found], what
            plan = ["plan", "--config", str(CONFIGS[0]), "--deepspeed", str(file)]
            assert rng.random() > 0.02 or main(plan) in (0, 2)


def test_a_run_on_this_machine(tries: Iterator[random.Random], flags: dict[str, str], tmp_path: Path) -> None:
    """With data and folders that are there: also what is made of the settings (optimizer, schedule) is tried."""
    names = [name for name in FLAGS if name not in ("deepspeed", "full_determinism")]
    for rng in tries:
        given: dict[str, str] = {**flags, "output_dir": str(tmp_path / "run")}
        name = rng.choice(names)
        choices = [str(choice) for choice in _fields()[name].choices] or WORDS
        given[name] = rng.choice([*choices, rng.choice(WORDS)])
        argv = [f"--{key}={value}" for key, value in given.items()]
        found: list[Config] = []
        result = outcome(partial(into, found, parse_config, argv))
        if found:
            assert agrees(name, given[name], found[0]), (name, given[name], held(found[0], name))
        else:
            assert result.code == 2 and result.lines and "\n" not in result.lines[0], (name, given[name], result.lines)
