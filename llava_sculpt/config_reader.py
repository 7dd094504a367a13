"""Command line and YAML file -> one run's configuration, with all mistakes in one error; the help text."""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin, get_type_hints

import torch
from annotated_types import Ge, Gt
from pydantic import Field
from transformers.integrations import integration_utils
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from transformers.utils import is_liger_kernel_available
from typing_extensions import NotRequired, TypedDict

from llava_sculpt.config import RANGES, Config, DataArguments, ModelArguments, SculptArguments, TrainingArguments
from llava_sculpt.errors import UserError
from llava_sculpt.names import LORASCULPT, shipped
from llava_sculpt.ranges import FINITE, out_of_range
from llava_sculpt.records import checked, parse_json, read_object
from llava_sculpt.yaml_reader import read_yaml

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
# Hugging Face's flags that cannot be set here, and why. (That they are given with their default changes nothing.)
_NOT_HERE = {
    "a run continues from the last checkpoint in its output_dir when the same command is given again": (
        "resume_from_checkpoint"
    ),
    "a run that is continued would end otherwise than one that was never stopped": (
        "save_only_model ignore_data_skip restore_callback_states_from_checkpoint dataloader_in_order"
    ),
    "the batch would not be the one that the run is known by": "auto_find_batch_size accelerator_config",
    "the launcher's environment variable says it": "local_rank",
    "a run saves a checkpoint at ctrl-C and TERM by itself": "enable_jit_checkpoint",
    "a run has one folder, which its first process writes": "save_on_each_node",
    "a run ends with its last step's weights, whose masks are saved": (
        "load_best_model_at_end metric_for_best_model greater_is_better"
    ),
    "the loss would compare every token with itself instead of the next (the Trainer knows no LLaVA)": (
        "label_smoothing_factor"
    ),
    "the collator needs every field as it is": "remove_unused_columns label_names length_column_name",
    "every sample is trained on": "dataloader_drop_last",
    "the held-out loss is all that is measured in training; `llava-sculpt eval` scores": (
        "do_predict batch_eval_metrics include_for_metrics prediction_loss_only eval_use_gather_object"
    ),
    "masks and the exact resume were never checked with it": (
        "torch_compile torch_compile_backend torch_compile_mode fsdp fsdp_config parallelism_config "
        "optim_target_modules"
    ),
    "use_liger_kernel takes its norms, rotary embedding and SwiGLU, and leaves the loss, which is short already": (
        "liger_kernel_config"
    ),
}
_ENUMS: dict[str, type[Enum]] = {"lr_scheduler_type": SchedulerType, "optim": OptimizerNames}
_BOOLS = dict.fromkeys(("yes", "true", "t", "y", "1"), True) | dict.fromkeys(("no", "false", "f", "n", "0"), False)
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


@dataclass(frozen=True)
class _Field:
    """A setting: its name, its type's alternatives, the values that it may have (empty: any of the type)."""

    name: str
    kinds: frozenset[Any]
    choices: tuple[Any, ...]

    def read(self, given: Any) -> Any:
        """A value as YAML or the command line gives it -> the field's. ValueError says what is wrong with it."""
        if (given is None or (given == "" and str in self.kinds)) and NoneType in self.kinds:
            return None
        if isinstance(given, list):
            if list not in self.kinds:
                raise ValueError(f"takes one value, got {self._shown(' '.join(map(str, given)))}")
            return [_text(item) for item in given]
        if isinstance(given, str) and given.startswith("{") and dict in self.kinds:
            given = parse_json(given, Path(f"--{self.name}"))
        if isinstance(given, dict) or (dict in self.kinds and self.name != "deepspeed"):
            if dict not in self.kinds or not isinstance(given, dict):
                raise ValueError(f"takes {'a mapping' if dict in self.kinds else 'one value'}, got {given!r:.60}")
            json.dumps(given, allow_nan=False)
            return given
        if given is False and "no" in self.choices:
            given = "no"  # which YAML takes for false
        kind = next((kind for kind in (bool, int, float) if kind in self.kinds), str)
        value = _scalar(given, kind)
        if kind in (int, float) and (wrong := out_of_range(value, kind, RANGES.get(self.name, FINITE))):
            raise ValueError(wrong)
        if self.choices and value not in self.choices:
            raise ValueError(f"{value!r:.60} is not one of {', '.join(map(str, self.choices))}")
        return value

    def _shown(self, value: str) -> str:
        return "several" if self.name == "hub_token" else f"{value:.60}"


def _scalar(given: Any, kind: type) -> Any:
    """Text or a YAML scalar as bool, int, float or str; what is no number of that kind stays as it is."""
    if kind is str:
        return _text(given)
    if kind is bool:
        if (word := str(given).lower()) not in _BOOLS:
            raise ValueError(f"must be true or false, got {given!r:.60}")
        return _BOOLS[word]
    if isinstance(given, str):
        with suppress(ValueError):
            return int(given) if kind is int else float(given)
    if kind is float and isinstance(given, int) and not isinstance(given, bool):
        with suppress(OverflowError):
            return float(given)
    return given


def _text(given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError(f"must be text, got {json.dumps(given, default=str):.60} (in YAML: put it in quotes)")
    if not given.strip() or "\0" in given:
        raise ValueError(f"must be text, got {given!r:.60}")
    try:
        given.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"must be UTF-8 text, got {given!a:.60}") from error
    return given


@cache
def _fields() -> dict[str, _Field]:
    """Every setting by name."""
    fields = {}
    for part in (ModelArguments, DataArguments, SculptArguments, TrainingArguments):
        hints = get_type_hints(part)
        for f in dataclasses.fields(part):
            union = get_origin(hints[f.name]) in (Union, UnionType)
            alternatives = get_args(hints[f.name]) if union else (hints[f.name],)
            kinds = frozenset(get_origin(kind) or kind for kind in alternatives)
            if f.name == "debug":  # options in one text; in a list they would not be looked at
                kinds -= {list}
            enums = [kind for kind in (*kinds, _ENUMS.get(f.name)) if isinstance(kind, type) and issubclass(kind, Enum)]
            members = [member.value for enum in enums for member in enum]
            fields[f.name] = _Field(f.name, kinds, tuple(f.metadata.get("choices", members)))
    return fields


def _read_command_line(argv: Sequence[str], problems: list[str]) -> tuple[dict[str, Any], str | None]:
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
        given: list[Any] = [inline] if equals else []
        while not equals and tokens and not tokens[0].startswith("--"):
            given.append(tokens.pop(0))
        # An underscore and a hyphen are the same letter, as in Hugging Face's scripts.
        key = key.replace("-", "_")
        field = _fields().get(key)
        if not given and field is not None and bool in field.kinds:
            given = [True]
        if key == "local_rank":  # the DeepSpeed launcher passes it; the environment variable says the same
            continue
        if key in values:
            problems.append(f"command line: {key}: given twice")
        elif not given and (key == "config" or field is not None):
            problems.append(f"command line: {key}: needs a value")
        else:
            values[key] = given[0] if len(given) == 1 else given
    config = values.pop("config", None)
    if isinstance(config, list):
        problems.append(f"command line: config: takes one file, got {' '.join(config)}")
        config = None
    return values, config


def _read(source: str, given: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The settings of one source, each of its field's type and in its range; what is wrong is added to `problems`."""
    values = {}
    for key, value in given.items():
        field = _fields().get(key)
        if field is None:
            reason = LLAVA_ONLY_FLAGS.get(key)
            if reason is not None:
                problems.append(f"{source}: {key} is not used here ({reason}); remove it")
                continue
            near = difflib.get_close_matches(key, _fields(), n=1)
            problems.append(f"{source}: unknown key {key:.60}" + (f"; did you mean {near[0]}?" if near else ""))
            continue
        try:
            values[key] = field.read(value)
        except UserError as error:
            problems += [f"{source}: {problem}" for problem in error.problems]
        except ValueError as error:
            problems.append(f"{source}: {key}: {error}")
    return values


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
    from_file: dict[str, Any] = {}
    if config_file is not None:
        try:
            from_file = read_yaml(Path(shipped(config_file)))
        except UserError as error:
            problems += [f"--config {problem}" for problem in error.problems]
    values = _read(str(config_file), from_file, problems) | _read("command line", overrides, problems)
    reports = values.get("report_to") or "none"
    values["report_to"] = reports if isinstance(reports, list) else [reports]

    parts: list[Any] = []
    for kind in (ModelArguments, DataArguments, SculptArguments):
        names = {f.name for f in dataclasses.fields(kind)}
        parts.append(kind(**{k: v for k, v in values.items() if k in names}))
    model, data, sculpt = parts
    problems += _impossible_values(model, data, sculpt, values)
    if not elsewhere:
        problems += _missing_here(model, data, values) + _launch_problems(os.environ)
    if values.get("deepspeed") is not None and not (elsewhere and isinstance(values["deepspeed"], str)):
        try:
            read_deepspeed(values["deepspeed"])
        except UserError as error:
            problems += error.problems
    if problems:  # before a process group is started
        raise UserError(problems)
    training_values = {k: v for k, v in values.items() if k in {f.name for f in dataclasses.fields(TrainingArguments)}}
    if training_values.get("use_liger_kernel"):
        # Its loss slices by a number of last tokens; ours comes at the positions that have a label, and needs no more.
        training_values["liger_kernel_config"] = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    if elsewhere:
        training_values |= {"use_cpu": True, "tf32": None, "deepspeed": None}
    else:
        training_values |= _cpu_processes(bool(values.get("deepspeed")))
        if isinstance(values.get("deepspeed"), str):
            training_values["deepspeed"] = shipped(values["deepspeed"])
    try:
        training = TrainingArguments(**training_values)
        if not elsewhere:
            _try_optimizer(training)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise UserError(f"training arguments: {' '.join(str(error).split())}") from error
    if elsewhere:
        training.deepspeed = values.get("deepspeed")
    return Config(model, data, sculpt, training)


def _try_optimizer(training: TrainingArguments) -> None:
    """Make the optimizer and the schedule of a run for one number: their options are not looked at before.

    Raises:
        ValueError, TypeError, ImportError: what they say of them.
    """
    from transformers import Trainer, get_scheduler

    if training.deepspeed_plugin is not None and (wrong := training.hf_deepspeed_config.mismatches):
        raise ValueError(f"they and the DeepSpeed configuration disagree: {'; '.join(wrong)}")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(training)
    optimizer = kind([torch.nn.Parameter(torch.zeros(2, 2))], **options)
    schedule, extra = training.lr_scheduler_type, cast("dict[str, Any] | None", training.lr_scheduler_kwargs)
    get_scheduler(schedule, optimizer, num_warmup_steps=1, num_training_steps=2, scheduler_specific_kwargs=extra)


_Size = Annotated[float, Ge(0), Field(allow_inf_nan=False)] | Literal["auto"]
_Count = Annotated[int, Gt(0)] | Literal["auto"]


class _Offload(TypedDict):
    device: NotRequired[Literal["cpu", "nvme", "none"]]


class _ZeroOptimization(TypedDict):
    stage: NotRequired[Annotated[int, Ge(0)]]
    overlap_comm: NotRequired[bool]
    reduce_bucket_size: NotRequired[_Size]
    allgather_bucket_size: NotRequired[_Size]
    stage3_prefetch_bucket_size: NotRequired[_Size]
    stage3_param_persistence_threshold: NotRequired[_Size]
    stage3_max_live_parameters: NotRequired[_Size]
    stage3_max_reuse_distance: NotRequired[_Size]
    offload_param: NotRequired[_Offload | None]
    offload_optimizer: NotRequired[_Offload | None]


class _Precision(TypedDict):
    enabled: NotRequired[bool | Literal["auto"]]


class DeepSpeedConfig(TypedDict):
    """What is read here of a DeepSpeed configuration; DeepSpeed knows more."""

    zero_optimization: NotRequired[_ZeroOptimization]
    train_batch_size: NotRequired[_Count]
    train_micro_batch_size_per_gpu: NotRequired[_Count]
    gradient_accumulation_steps: NotRequired[_Count]
    gradient_clipping: NotRequired[_Size]
    bf16: NotRequired[_Precision]
    fp16: NotRequired[_Precision]


def read_deepspeed(deepspeed: str | dict[str, Any]) -> DeepSpeedConfig:
    """A DeepSpeed configuration, from its file or as it was given.

    Raises:
        UserError: no file, not a JSON object, values of another type, or an optimizer or scheduler of its own.
    """
    source = f"deepspeed: {deepspeed}" if isinstance(deepspeed, str) else "deepspeed"
    try:
        found = read_object(Path(shipped(deepspeed))) if isinstance(deepspeed, str) else deepspeed
    except UserError as error:
        raise UserError(f"deepspeed: {problem}" for problem in error.problems) from error
    if own := [key for key in ("optimizer", "scheduler") if key in found]:
        raise UserError(f"{source}: {key}: must not be there, the flags of training decide it" for key in own)
    return checked(found, DeepSpeedConfig, source)


def without_token(words: Sequence[str]) -> tuple[list[str], str | None]:
    """A command line without the Hub's token, to be shown or recorded, and the token."""
    kept, token = [], None
    flags = ("--hub_token", "--hub-token")
    for before, word in zip(["", *words], words, strict=False):
        flag, equals, value = word.partition("=")
        if before in flags and not word.startswith("--"):
            token = word
        elif flag in flags:
            token = value if equals else token
        else:
            kept.append(word)
    return kept, token


def with_defaults(flags: Sequence[str], defaults: Mapping[str, object]) -> list[str]:
    """Flags of training, and behind them those of `defaults` that are not among them."""
    given = {word[2:].partition("=")[0].replace("-", "_") for word in flags if word.startswith("--")}
    return [*flags, *(w for key, value in defaults.items() if key not in given for w in (f"--{key}", str(value)))]


def flag_value(flags: Sequence[str], key: str) -> str | None:
    """The value of one flag of training; None if it is not given."""
    for word, following in zip(flags, [*flags[1:], ""], strict=False):
        flag, equals, value = word.partition("=")
        if flag.replace("-", "_") == f"__{key}":
            return value if equals else following
    return None


def _launch_problems(environment: Mapping[str, str]) -> list[str]:
    """What is wrong with the variables that torchrun, deepspeed and accelerate set."""
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
    problems = [
        f"environment: {name}: must be a whole number, got {environment[name]!r:.60}"
        for name in names
        if name in environment and not re.fullmatch(r"[0-9]{1,9}", environment[name])
    ]
    if not problems and int(environment.get("WORLD_SIZE", "1")) > 1:
        missing = [name for name in (*names[1:3], "MASTER_ADDR", "MASTER_PORT") if name not in environment]
        if missing:
            problems.append(f"environment: WORLD_SIZE without {', '.join(missing)}: start with torchrun or deepspeed")
        elif int(environment["RANK"]) >= int(environment["WORLD_SIZE"]):
            problems.append("environment: RANK must be below WORLD_SIZE")
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        problems.append(f"environment: ACCELERATE_MIXED_PRECISION={precision}: use --bf16 true or --fp16 true instead")
    return problems


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
    problems += sculpt.problems()
    if sculpt.method != LORASCULPT and model.connector == "sculpt":
        problems.append("connector: sculpt needs method: sculpt (use connector: lora)")
    if values.get("fp16") and not torch.cuda.is_available():
        problems.append("fp16: needs a GPU; use bf16 or neither")
    defaults = {f.name: f.default for f in dataclasses.fields(TrainingArguments)}
    problems += [
        f"{name}: not supported: {reason}"
        for reason, names in _NOT_HERE.items()
        for name in names.split()
        if name in values and values[name] != defaults[name]
    ]
    if values.get("save_strategy") == "best":
        problems.append(
            "save_strategy: a run continues from its last checkpoint, not from its best; use steps or epoch"
        )
    if values.get("lr_scheduler_type") in ("reduce_lr_on_plateau", "greedy"):
        problems.append("lr_scheduler_type: must not follow the held-out loss, which is no part of what a run is")
    if values.get("train_sampling_strategy") in ("group_by_length", "batch_rebalance"):
        problems.append("train_sampling_strategy: needs a column of lengths, which the data has not; use random")
    if values.get("group_by_modality_length", defaults["group_by_modality_length"]):
        problems += [
            f"{name}: has no effect with group_by_modality_length"
            for name in ("data_seed", "train_sampling_strategy")
            if name in values and values[name] != defaults[name]
        ]
    if not values.get("dataloader_num_workers"):
        problems += [
            f"{name}: needs dataloader_num_workers"
            for name in ("dataloader_persistent_workers", "dataloader_multiprocessing_context")
            if values.get(name)
        ]
    steps = values.get("warmup_steps", 0)
    if steps > 1 and steps % 1:
        problems.append(f"warmup_steps: whole steps, or a fraction below 1; got {steps}")
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
    if not evaluates:
        problems += [f"{name}: needs --eval_strategy" for name in ("eval_on_start", "do_eval") if values.get(name)]
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
    if values.get("use_liger_kernel"):
        if not torch.cuda.is_available():
            problems.append("use_liger_kernel: needs a GPU: leave it out")
        elif not is_liger_kernel_available():
            problems.append("use_liger_kernel: not installed here: pip install liger-kernel")
    every: Any = (values.get("activation_checkpointing_kwargs") or {}).get("every_n_layers", 1)
    if not isinstance(every, int) or every < 1:
        problems.append(
            f"activation_checkpointing_kwargs: every_n_layers: a number of layers from 1 on, got {every!r:.60}"
        )
    installed = integration_utils.get_available_reporting_integrations()
    for name in values["report_to"]:
        if name in integration_utils.INTEGRATION_TO_CALLBACK and name not in (*installed, "flyte"):
            problems.append(f"report_to: {name} is not installed here: pip install {name}")
    return problems
