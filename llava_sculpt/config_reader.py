"""Command line and YAML file -> one run's configuration, with all mistakes in one error; the help text."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import HfArgumentParser
from transformers.integrations import integration_utils

from llava_sculpt.config import Config, DataArguments, ModelArguments, SculptArguments, TrainingArguments
from llava_sculpt.errors import UserError
from llava_sculpt.names import LORASCULPT

# Flags of LLaVA's own train.py that have no counterpart here, and what to tell who pastes a command with them.
LLAVA_ONLY_FLAGS = {
    "lora_enable": "LoRA is always on",
    "lazy_preprocess": "samples are always tokenised on demand",
    "is_multimodal": "decided by the data",
    "tune_mm_mlp_adapter": "use --connector full|frozen|lora|sculpt",
    "freeze_mm_mlp_adapter": "use --connector frozen",
    "freeze_backbone": "the base model is always frozen",
    "pretrain_mm_mlp_adapter": "the base checkpoint already holds its connector",
    "mm_projector_type": "read from the base checkpoint",
    "mm_vision_select_layer": "read from the base checkpoint",
    "mm_vision_select_feature": "read from the base checkpoint",
    "mm_use_im_start_end": "LLaVA-1.5 does not use it",
    "mm_use_im_patch_token": "LLaVA-1.5 does not use it",
    "lora_bias": "LoRASculpt trains no biases",
    "lora_weight_path": "continue a run through its --output_dir",
    "evaluation_strategy": "use --eval_strategy with --eval_data_path",
}
# Hugging Face's own flags that most runs set: listed with ours in the help.
_OFTEN_SET = (
    "per_device_train_batch_size gradient_accumulation_steps max_steps bf16 activation_checkpointing deepspeed "
    "weight_decay save_steps eval_strategy eval_steps disable_tqdm report_to seed push_to_hub hub_model_id"
).split()


def help_text() -> str:
    """All flags of training in groups, each with its default and help; of Hugging Face's own the first sentence."""
    training = {f.name: f for f in dataclasses.fields(TrainingArguments)}
    own = [name for name in training if name in TrainingArguments.__annotations__] + _OFTEN_SET
    groups: dict[str, list[Any]] = {
        "model": list(dataclasses.fields(ModelArguments)),
        "data": list(dataclasses.fields(DataArguments)),
        "method": list(dataclasses.fields(SculptArguments)),
        "training": [training[name] for name in own],
        "Hugging Face's own (TrainingArguments)": [f for name, f in training.items() if name not in own],
    }
    lines = [
        "usage: llava-sculpt train --config FILE.yaml [--key value ...]",
        "",
        "Every flag is also a key of the YAML file, and wins over it. An interrupted run continues when the same",
        "command is given again. `llava-sculpt plan` with the same flags says how much memory the run needs.",
    ]
    for title, fields in groups.items():
        lines += ["", f"{title}:"]
        for f in fields:
            text = " ".join(f.metadata.get("help", "").replace("%%", "%").split())
            if f.name in training and f.name not in TrainingArguments.__annotations__:
                text = re.split(r"(?<=[^.]{3}\.)\s+(?=[A-Z`(])", text)[0]
            choices = "|".join(str(choice) for choice in f.metadata.get("choices", ()))
            default = getattr(f.default, "value", f.default)
            shown = "" if default in (None, dataclasses.MISSING) else f" (default {default})"
            shown = " (required)" if default == "" else shown
            lines += textwrap.wrap(
                f"--{f.name}{' ' * bool(choices)}{choices}  {text}{shown}",
                100,
                initial_indent="  ",
                subsequent_indent=" " * 6,
            )
    return "\n".join(lines)


def _parser() -> HfArgumentParser:
    parts: Any = (ModelArguments, DataArguments, SculptArguments, TrainingArguments)
    return HfArgumentParser(parts, allow_abbrev=False, exit_on_error=False)


def _read_yaml(path: Path, problems: list[str]) -> dict[str, Any]:
    """The keys of a configuration file; what is wrong with it is added to `problems`."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        problems.append(f"--config {path}: no such file")
        return {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        problems.append(f"--config {path}: not readable as YAML: {' '.join(str(error).split())}")
        return {}
    if not isinstance(values, dict):
        problems.append(f"--config {path}: expected `key: value` lines at the top level")
        return {}
    return values


def _read_command_line(argv: list[str], problems: list[str]) -> tuple[dict[str, Any], str | None]:
    """`--key value`, `--key=value` and `--flag` -> ({key: value or list}, the --config path)."""
    values: dict[str, Any] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if not token.startswith("--"):
            file = tokens.pop(0) if token == "-c" and tokens else token
            if file.endswith((".yaml", ".yml")):
                raise UserError(f"command line: {file!r} does not belong to a flag; did you mean --config {file}?")
            problems.append(f"command line: {token!r} does not belong to a flag (flags begin with --)")
            continue
        key, equals, inline = token[2:].partition("=")
        given = [inline] if equals else []
        while not equals and tokens and not tokens[0].startswith("--"):
            given.append(tokens.pop(0))
        # An underscore and a hyphen are the same letter, as in Hugging Face's scripts.
        values[key.replace("-", "_")] = True if not given else given[0] if len(given) == 1 else given
    values.pop("local_rank", None)  # the DeepSpeed launcher passes it; the environment variable says the same
    config = values.pop("config", None)
    return values, config


def _convert(parser: HfArgumentParser, source: str, key: str, value: Any, problems: list[str]) -> dict[str, Any]:
    """One value through the same argparse conversion wherever it comes from; {} and a problem if it does not fit."""
    action = parser._option_string_actions.get(f"--{key}")
    if action is None or key == "help":
        reason = LLAVA_ONLY_FLAGS.get(key)
        if reason is not None:
            problems.append(f"{source}: {key} is not used here ({reason}); remove it")
            return {}
        known = [name[2:] for name in parser._option_string_actions if name.startswith("--")]
        near = difflib.get_close_matches(key, known, n=1)
        problems.append(f"{source}: unknown key {key}" + (f"; did you mean {near[0]}?" if near else ""))
        return {}
    if value is None:
        return {key: None}
    if isinstance(value, dict):
        words = [json.dumps(value)]
    elif isinstance(value, list):
        words = [str(item) for item in value]
    else:
        words = [str(value)]
    try:
        parsed, rest = parser.parse_known_args([f"--{key}={words[0]}"] if len(words) == 1 else [f"--{key}", *words])
    except (argparse.ArgumentError, ValueError, TypeError) as error:
        message = error.message if isinstance(error, argparse.ArgumentError) else str(error)
        problems.append(f"{source}: {key}: {message}")
        return {}
    if rest and key == "report_to":  # a string or a list of them, of which the parser takes one
        return {key: words}
    if rest:
        problems.append(f"{source}: {key}: takes one value, got {' '.join(words)}")
    return {key: getattr(parsed, key)}


def parse_config(argv: list[str], *, elsewhere: bool = False) -> Config:
    """Command line (`--config FILE.yaml` and overrides) -> validated configuration.

    Args:
        elsewhere: the run is for another machine: its data, folders, GPU, DeepSpeed and packages need not be here.
            Nothing is opened and no process group is started; `deepspeed` stays as it was given.

    Raises:
        UserError: one error listing every unknown key, wrong type and impossible value of file and command line.
    """
    problems: list[str] = []
    overrides, config_file = _read_command_line(argv, problems)
    from_file = _read_yaml(Path(config_file), problems) if config_file else {}
    parser = _parser()
    values: dict[str, Any] = {}
    for source, given in ((str(config_file), from_file), ("command line", overrides)):
        for key, value in given.items():
            values.update(_convert(parser, source, str(key), value, problems))
    reports = values.get("report_to") or "none"
    values["report_to"] = reports if isinstance(reports, list) else [reports]

    parts: list[Any] = []
    for kind in (ModelArguments, DataArguments, SculptArguments):
        names = {f.name for f in dataclasses.fields(kind)}
        parts.append(kind(**{k: v for k, v in values.items() if k in names}))
    model, data, sculpt = parts
    problems += _impossible_values(model, data, sculpt, values)
    if not elsewhere:
        problems += _missing_here(model, data, values)
    training_values = {k: v for k, v in values.items() if k in {f.name for f in dataclasses.fields(TrainingArguments)}}
    if elsewhere:
        training_values |= {"use_cpu": True, "tf32": None, "deepspeed": None}
    else:
        training_values |= _cpu_processes(bool(values.get("deepspeed")))
    try:
        training = TrainingArguments(**training_values)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError([*problems, f"training arguments: {' '.join(str(error).split())}"]) from error
    if problems:
        raise UserError(problems)
    if elsewhere:
        training.deepspeed = values.get("deepspeed")
    return Config(model, data, sculpt, training)


def _cpu_processes(deepspeed: bool) -> dict[str, Any]:
    """Training arguments that several processes without a GPU need (torchrun or deepspeed on a CPU machine).

    Left alone, the Trainer finds no backend and every process trains by itself; with `use_cpu` DeepSpeed is
    silently replaced by DDP.
    """
    if torch.cuda.is_available() or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return {}
    if not deepspeed:
        return {"use_cpu": True}
    from accelerate import PartialState

    os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    return {"use_cpu": True, "accelerator_config": {"use_configured_state": True}}


def _impossible_values(
    model: ModelArguments, data: DataArguments, sculpt: SculptArguments, values: dict[str, Any]
) -> list[str]:
    problems = []
    if not model.model_name_or_path:
        problems.append("model_name_or_path: required, give it in the YAML or as --model_name_or_path")
    if model.lora_r < 1:
        problems.append(f"lora_r: must be at least 1, got {model.lora_r}")
    if model.lora_alpha is not None and model.lora_alpha <= 0:
        problems.append(f"lora_alpha: must be above 0, got {model.lora_alpha}")
    if not 0 <= model.lora_dropout < 1:
        problems.append(f"lora_dropout: must be in [0, 1), got {model.lora_dropout}")
    problems += sculpt.problems()
    if sculpt.method != LORASCULPT and model.connector == "sculpt":
        problems.append("connector: sculpt needs method: sculpt (use connector: lora)")
    if values.get("fp16") and not torch.cuda.is_available():
        problems.append("fp16: needs a GPU; use bf16 or neither")
    for name in ("learning_rate", "mm_projector_lr", "num_train_epochs"):
        value = values.get(name)
        if value is not None and not value > 0:
            problems.append(f"{name}: must be above 0, got {value}")
    for name in ("per_device_train_batch_size", "gradient_accumulation_steps", "model_max_length"):
        value = values.get(name)
        if value is not None and value < 1:
            problems.append(f"{name}: must be at least 1, got {value}")
    known = list(integration_utils.INTEGRATION_TO_CALLBACK)
    for name in values["report_to"]:
        if name not in (*known, "all", "none"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}, all, none"
            problems.append(f"report_to: unknown {name!r}; {hint}")
    evaluates = values.get("eval_strategy", "no") != "no"
    if evaluates and not data.eval_data_path:
        problems.append("eval_strategy: needs held-out samples: give their LLaVA JSON as --eval_data_path")
    if data.eval_data_path and not evaluates:
        problems.append("eval_data_path: is read only with --eval_strategy steps or epoch")
    if values.get("load_best_model_at_end"):
        problems.append("load_best_model_at_end: a run ends with its last step's weights, whose masks are saved")
    return problems


def _missing_here(model: ModelArguments, data: DataArguments, values: dict[str, Any]) -> list[str]:
    """What a run needs of this machine and does not find."""
    problems = [
        f"{name}: required, give it in the YAML or as --{name}"
        for name in ("data_path", "image_folder", "output_dir")
        if not values.get(name)
    ]
    for name, path in (("data_path", data.data_path), ("eval_data_path", data.eval_data_path)):
        if path and not os.path.isfile(path):
            problems.append(f"{name}: no such file: {path}")
    for name, path in (("image_folder", data.image_folder), ("eval_image_folder", data.eval_image_folder)):
        if path and not os.path.isdir(path):
            problems.append(f"{name}: no such folder: {path}")
    deepspeed = values.get("deepspeed")
    if isinstance(deepspeed, str) and deepspeed.endswith(".json") and not os.path.isfile(deepspeed):
        problems.append(f"deepspeed: no such file: {deepspeed}")
    installed = integration_utils.get_available_reporting_integrations()
    for name in values["report_to"]:
        if name in integration_utils.INTEGRATION_TO_CALLBACK and name not in (*installed, "flyte"):
            problems.append(f"report_to: {name} is not installed here: pip install {name}")
    return problems
