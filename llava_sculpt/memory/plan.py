"""`llava-sculpt plan`: memory, steps and arithmetic of a run, before anything of it is loaded.

The parts come from `memory.py`. A GPU of "24 GB" is taken as 24 * 10^9 bytes: cards sold as 24 GB show between
22.5 GiB (A10, L4) and 24 GiB (RTX 4090), and 24 * 10^9 bytes are 22.4 GiB. Sizes are printed in GiB.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava_sculpt.config import Config, parse_config, read_command_line, read_yaml
from llava_sculpt.data.conversation import IMAGE_TOKEN_INDEX, encode_record, record_problems
from llava_sculpt.data.dataset import read_records
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.memory.parts import Architecture, Setup, Zero, memory_parts, moments, step_flops
from llava_sculpt.model.checkpoint import known_tower
from llava_sculpt.model.layout import CLIP_L_336, hf_config, is_original
from llava_sculpt.names import PENALTIES
from llava_sculpt.records import read_json

GIB = 2**30
GB = 10**9
ASSUMED_SAMPLES = 10_000  # the size of the paper's training sets
_SHORTEST_TEXT = 64  # tokens that a shorter model_max_length must leave beside the image
_LOWEST_RANK = 8
_OUR_BUCKETS = functools.partial(Zero, reduce_bucket=50_000_000, overlap=True)  # as in configs/zero*.json

# Public facts of the two checkpoints; what is not named has the default of LlavaConfig.
_KNOWN_TEXT = {
    "llava-hf/llava-1.5-7b-hf": (4096, 32, 32, 11008),
    "llava-hf/llava-1.5-13b-hf": (5120, 40, 40, 13824),
    "liuhaotian/llava-v1.5-7b": (4096, 32, 32, 11008),
    "liuhaotian/llava-v1.5-13b": (5120, 40, 40, 13824),
}


@dataclass(frozen=True)
class Plan:
    """An estimate for one GPU, and what it was made from.

    Attributes:
        setup: the sizes behind it; `setup.length` is the longest sample's.
        parts: bytes per GPU by part, at the worst moment of a step.
        moments: bytes of activations at each moment that could be the worst.
        samples, steps: of the training set; optimizer steps of the whole run.
        typical_length: median tokens per sample, None when the data was not read.
        total_tokens: of the whole run; without data every sample counts with `setup.length`.
        notes: what the reader should know about this estimate.
    """

    setup: Setup
    parts: dict[str, int]
    moments: dict[str, int]
    samples: int
    steps: int
    typical_length: int | None
    total_tokens: int
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> int:
        """Bytes per GPU."""
        return sum(self.parts.values())

    @property
    def typical_total(self) -> int | None:
        """Bytes per GPU in a step of samples of median length."""
        if self.typical_length is None:
            return None
        return sum(memory_parts(dataclasses.replace(self.setup, length=self.typical_length)).values())

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step on all GPUs, padding included, at the typical length if known."""
        length = self.typical_length or self.setup.length
        return length * self.setup.batch * self.setup.accumulation * self.setup.gpus

    @property
    def flops(self) -> int:
        """Floating-point operations of the whole run, at the typical length if known (see `step_flops`)."""
        length = self.typical_length or self.setup.length
        return self.steps * step_flops(dataclasses.replace(self.setup, length=length))

    def fits(self, gpu_bytes: int) -> bool:
        """Whether a GPU with so many bytes is enough."""
        return self.total <= gpu_bytes

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-serialisable; memory in bytes."""
        worst = max(self.moments, key=lambda name: self.moments[name])
        return {
            "parts": self.parts,
            "total": self.total,
            "typical_total": self.typical_total,
            "worst_moment": worst,
            "moments": self.moments,
            "samples": self.samples,
            "steps": self.steps,
            "longest": self.setup.length,
            "typical_length": self.typical_length,
            "tokens_per_step": self.tokens_per_step,
            "total_tokens": self.total_tokens,
            "flops": self.flops,
            "gpus": self.setup.gpus,
            "zero": None if self.setup.zero is None else self.setup.zero.stage,
            "per_device_train_batch_size": self.setup.batch,
            "gradient_accumulation_steps": self.setup.accumulation,
            "trainable_parameters": self.setup.trainable,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Remedy:
    """A change of the configuration that makes a run smaller."""

    flags: str
    setup: Setup

    @property
    def total(self) -> int:
        """Bytes per GPU after the change."""
        return sum(memory_parts(self.setup).values())


def make_plan(
    config: Config,
    checkpoint_config: dict[str, Any],
    gpus: int,
    zero: int | None,
    samples: int,
    lengths: Sequence[int] | None = None,
) -> Plan:
    """Estimate one run from its configuration.

    Args:
        checkpoint_config: config.json of the base model, parsed.
        gpus: processes that train together, one GPU each.
        zero: DeepSpeed's ZeRO stage, None without DeepSpeed. Bucket sizes are those of `config.training.deepspeed`.
        samples: of the training set.
        lengths: tokens of each sample with its image (sign ignored, as in `LlavaDataset.modality_lengths`);
            None assumes that every sample has `model_max_length` tokens.

    Raises:
        UserError: the DeepSpeed configuration cannot be read, or quantised weights with ZeRO-3.
    """
    arguments, model, sculpt = config.training, config.model, config.sculpt
    if zero == 3 and model.bits < 16:
        raise UserError(f"bits: {model.bits} does not go with ZeRO-3; use ZeRO-2, or bits: 16")
    is_sculpt = sculpt.method == "sculpt"
    cut = [min(abs(length), arguments.model_max_length) for length in lengths or ()]
    architecture = Architecture.from_config(checkpoint_config)
    setup = Setup(
        architecture=architecture,
        half=bool(arguments.bf16 or arguments.fp16),
        bits=model.bits,
        double_quant=model.double_quant,
        lora_r=model.lora_r,
        lora_dropout=model.lora_dropout,
        connector=model.connector,
        regularized=is_sculpt and sculpt.sculpt_alpha > 0,
        connector_regularized=is_sculpt and model.connector == "sculpt" and sculpt.sculpt_beta > 0,
        masked=config.prunes,
        zero=None if zero is None else _zero(arguments.deepspeed, zero, architecture.hidden),
        gpus=gpus,
        batch=arguments.per_device_train_batch_size,
        accumulation=arguments.gradient_accumulation_steps,
        length=max(cut, default=arguments.model_max_length),
        checkpointing=bool(arguments.activation_checkpointing),
    )
    steps = optimizer_steps(config, samples, gpus)
    samples_seen = steps * setup.batch * setup.accumulation * gpus
    return Plan(
        setup=setup,
        parts=memory_parts(setup),
        moments=moments(setup),
        samples=samples,
        steps=steps,
        typical_length=int(statistics.median(cut)) if cut else None,
        total_tokens=round(samples_seen * (statistics.fmean(cut) if cut else setup.length)),
        notes=tuple(_notes(config, setup, read_lengths=bool(cut))),
    )


def check_fits(plan: Plan, gpu_bytes: int) -> None:
    """Do nothing if the plan fits a GPU of so many bytes.

    Raises:
        UserError: it does not; one message with what it needs and the least harmful change that would fit.
    """
    if plan.fits(gpu_bytes):
        return
    remedy = find_remedy(plan.setup, gpu_bytes)
    what = "nothing tried here makes it fit" if remedy is None else f"{remedy.flags} needs {_gib(remedy.total)}"
    raise UserError(
        f"this run needs about {_gib(plan.total)} per GPU and the GPU has {_gib(gpu_bytes)}; {what} "
        "(`llava-sculpt plan` shows the parts; --ignore_plan true starts it all the same)"
    )


def find_remedy(setup: Setup, gpu_bytes: int) -> Remedy | None:
    """The first change that fits, the least harmful tried first; None if none does.

    In this order: a smaller micro-batch at the same global batch, activation checkpointing and ZeRO-3 (same result,
    slower), 4-bit base weights, ZeRO-3 with weights in the host's memory (same result, very slow), shorter samples,
    a lower rank (another result). Each is tried alone; if none is enough, each on top of those before it.
    """
    for tried in (_alone(setup), _together(setup)):
        for remedy in tried:
            if remedy.total <= gpu_bytes:
                return remedy
    return None


def _alone(setup: Setup) -> Iterator[Remedy]:
    for change in _CHANGES:
        yield from change(setup)


def _together(setup: Setup) -> Iterator[Remedy]:
    flags: list[str] = []
    for change in _CHANGES:
        last = None
        for remedy in change(setup):
            last = remedy
            yield Remedy(" ".join([*flags, remedy.flags]), remedy.setup)
        if last is not None:
            setup = last.setup
            flags.append(last.flags)


def _smaller_batches(setup: Setup) -> Iterator[Remedy]:
    for batch in range(setup.batch - 1, 0, -1):
        if setup.batch % batch == 0:
            accumulation = setup.accumulation * setup.batch // batch
            yield Remedy(
                f"--per_device_train_batch_size {batch} --gradient_accumulation_steps {accumulation}",
                dataclasses.replace(setup, batch=batch, accumulation=accumulation),
            )


def _checkpointing(setup: Setup) -> Iterator[Remedy]:
    if not setup.checkpointing:
        yield Remedy("--activation_checkpointing true", dataclasses.replace(setup, checkpointing=True))


def _zero3(setup: Setup) -> Iterator[Remedy]:
    # Quantised weights cannot be split; one GPU has nothing to split with.
    if setup.bits == 16 and setup.stage < 3 and setup.gpus > 1:
        yield Remedy("--deepspeed configs/zero3.json", dataclasses.replace(setup, zero=_OUR_BUCKETS(3)))


def _offload(setup: Setup) -> Iterator[Remedy]:
    if setup.bits == 16 and not (setup.zero and setup.zero.offload_weights):
        zero = dataclasses.replace(_OUR_BUCKETS(3), offload_weights=True, offload_optimizer=True)
        yield Remedy("--deepspeed configs/zero3_offload.json", dataclasses.replace(setup, zero=zero))


def _four_bits(setup: Setup) -> Iterator[Remedy]:
    if setup.bits > 4 and setup.stage < 3:
        yield Remedy("--bits 4", dataclasses.replace(setup, bits=4))


def _shorter(setup: Setup) -> Iterator[Remedy]:
    shortest = setup.architecture.image_tokens + _SHORTEST_TEXT
    for length in range(setup.length // 256 * 256, shortest - 1, -256):
        if length < setup.length:
            yield Remedy(f"--model_max_length {length}", dataclasses.replace(setup, length=length))


def _lower_rank(setup: Setup) -> Iterator[Remedy]:
    r = setup.lora_r // 2
    while r >= _LOWEST_RANK:
        yield Remedy(f"--lora_r {r}", dataclasses.replace(setup, lora_r=r))
        r //= 2


_CHANGES: tuple[Callable[[Setup], Iterator[Remedy]], ...] = (
    _smaller_batches,
    _checkpointing,
    _zero3,
    _four_bits,
    _offload,
    _shorter,
    _lower_rank,
)


def optimizer_steps(config: Config, samples: int, processes: int) -> int:
    """Optimizer steps of the whole run, by the Trainer's own rule (partial batches and partial steps count)."""
    arguments = config.training
    if arguments.max_steps > 0:
        return arguments.max_steps
    batches = math.ceil(math.ceil(samples / processes) / arguments.per_device_train_batch_size)
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    return math.ceil(arguments.num_train_epochs * per_epoch)


def _notes(config: Config, setup: Setup, *, read_lengths: bool) -> Iterator[str]:
    if not read_lengths:
        yield f"the data was not read: every sample is assumed to have model_max_length = {setup.length} tokens"
    optimizer = str(getattr(config.training.optim, "value", config.training.optim))
    if not optimizer.startswith("adamw"):
        yield f"optim {optimizer}: its states are counted as Adam's"
    method, matrices = config.sculpt.method, setup.architecture.layer_matrices
    if method == "dora":
        # PEFT makes BA by sending an identity through it, adds it to W and takes norms, module by module.
        beside = setup.width * max(columns**2 + 3 * rows * columns for rows, columns in matrices)
        yield f"method dora: the norms of W + BA, about {_gib(beside)} for a moment in every layer, are not counted"
    if method in PENALTIES:
        copies = 4 * setup.llm_lora // setup.gpus
        yield f"method {method}: what its term keeps until backward, up to {_gib(copies)}, is not counted"


def zero_stage(deepspeed: str | dict[str, Any] | None) -> int | None:
    """ZeRO stage of a DeepSpeed configuration (file or dictionary); None without one.

    Raises:
        UserError: it cannot be read.
    """
    section = _zero_section(deepspeed)
    return None if section is None else int(section.get("stage", 0))


def _zero_section(deepspeed: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not deepspeed:
        return None
    if isinstance(deepspeed, str):
        try:
            deepspeed = json.loads(Path(deepspeed).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"deepspeed: {deepspeed} cannot be read as JSON ({error})") from error
    section = deepspeed.get("zero_optimization", {}) if isinstance(deepspeed, dict) else None
    if not isinstance(section, dict):
        raise UserError("deepspeed: expected an object with the key zero_optimization")
    return section


def _zero(deepspeed: str | dict[str, Any] | None, stage: int, hidden: int) -> Zero:
    """Bucket sizes of the configuration; another stage than it names, or none, gets this repository's."""
    section = _zero_section(deepspeed) if deepspeed and _is_there(deepspeed) else None
    if section is None or section.get("stage") != stage:
        return _OUR_BUCKETS(stage)
    # DeepSpeed's defaults; "auto" is what Hugging Face's integration puts in its place.
    return Zero(
        stage,
        reduce_bucket=_elements(section, "reduce_bucket_size", 500_000_000, hidden * hidden),
        overlap=bool(section.get("overlap_comm", stage == 3)),
        prefetch_bucket=_elements(section, "stage3_prefetch_bucket_size", 50_000_000, hidden * hidden * 9 // 10),
        persistence_threshold=_elements(section, "stage3_param_persistence_threshold", 100_000, 10 * hidden),
        offload_weights=_goes_to_host(section, "offload_param"),
        offload_optimizer=_goes_to_host(section, "offload_optimizer"),
    )


def _goes_to_host(section: dict[str, Any], key: str) -> bool:
    return (section.get(key) or {}).get("device", "none") != "none"


def _is_there(deepspeed: str | dict[str, Any]) -> bool:
    return isinstance(deepspeed, dict) or Path(deepspeed).is_file()


def _elements(section: dict[str, Any], key: str, default: int, auto: int) -> int:
    value = section.get(key, default)
    return auto if value == "auto" else int(float(value))


def read_checkpoint_config(name_or_path: str) -> dict[str, Any]:
    """config.json of a local folder, of a cached Hub model, or as known for LLaVA-1.5-7B and 13B.

    Raises:
        UserError: none of these.
    """
    file = Path(name_or_path) / "config.json"
    if not file.is_file() and name_or_path.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        try:
            cached: object = try_to_load_from_cache(name_or_path, "config.json")
        except ValueError:  # not a possible Hub id
            cached = None
        file = Path(cached) if isinstance(cached, str) else file
    if file.is_file():
        found = read_json(file)
        if is_original(found):
            return hf_config(found, known_tower(file.parent, found["mm_vision_tower"]))
        if found.get("model_type") != "llava":
            raise UserError(f"{file}: not the config.json of a LLaVA-1.5 model (model_type is not 'llava')")
        return found
    if name_or_path in _KNOWN_TEXT:
        hidden, layers, heads, intermediate = _KNOWN_TEXT[name_or_path]
        return {
            "model_type": "llava",
            "image_token_index": 32000,
            "text_config": {
                "model_type": "llama",
                "vocab_size": 32064,
                "hidden_size": hidden,
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "intermediate_size": intermediate,
            },
            "vision_config": CLIP_L_336,
        }
    raise UserError(
        f"model_name_or_path: {name_or_path} is neither a folder with config.json nor in the Hub cache; "
        f"known without either: {', '.join(_KNOWN_TEXT)}"
    )


def parse_plan_config(argv: list[str]) -> Config:
    """`parse_config` for a machine without the run's data, GPU or DeepSpeed: those flags are not acted upon.

    Nothing is opened and no process group is started. `data_path`, `image_folder` and `deepspeed` are in the
    result as they were given.

    Raises:
        UserError: every other problem of file and command line.
    """
    problems: list[str] = []
    flags, file = read_command_line(argv, problems)
    given = {**(read_yaml(Path(file), problems) if file else {}), **flags}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "data.json").touch()
        stand_ins = {"data_path": f"{folder}/data.json", "image_folder": folder, "output_dir": folder}
        stand_ins |= {"use_cpu": "true", "tf32": "false", "deepspeed": ""}
        config = parse_config([*argv, *(f"--{key}={value}" for key, value in stand_ins.items())])
    config.data.data_path = str(given.get("data_path") or "")
    config.data.image_folder = str(given.get("image_folder") or "")
    config.training.output_dir = str(given.get("output_dir") or "")
    config.training.deepspeed = given.get("deepspeed") or None
    return config


def _read_lengths(config: Config, image_tokens: int) -> tuple[int, list[int] | None]:
    """Samples, and tokens of each, of the training file; assumed and None where it or the tokenizer is missing."""
    path = Path(config.data.data_path)
    if not path.is_file():
        return ASSUMED_SAMPLES, None
    records = read_records(path)
    base = Path(config.model.model_name_or_path)
    if not (base / "tokenizer.model").is_file():
        return len(records), None
    tokenizer = LlavaTokenizer.from_dir(base)
    lengths = []
    for number, record in enumerate(records, start=1):
        problems = record_problems(record)
        if problems:
            raise UserError(f"{path}: record {number} of {len(records)}: {problems[0]}")
        ids, _ = encode_record(record, tokenizer)
        lengths.append(len(ids) + (image_tokens - 1) * ids.count(IMAGE_TOKEN_INDEX))
    return len(records), lengths


def run_plan(argv: list[str], gpus: int, gpu_memory: float, zero: int | None, *, as_json: bool) -> int:
    """Print the plan of a training command line; returns 0, whether it fits or not.

    Args:
        argv: `--config FILE.yaml` and any flag of training.
        gpu_memory: of one GPU in GB, 10^9 bytes.
        zero: ZeRO stage in place of the configuration's.

    Raises:
        UserError: bad configuration, unknown model, unreadable data, or impossible numbers of GPUs or GB.
    """
    if gpus < 1 or not gpu_memory > 0:
        raise UserError(f"--gpus must be at least 1 and --gpu_memory above 0, got {gpus} and {gpu_memory}")
    config = parse_plan_config(argv)
    checkpoint_config = read_checkpoint_config(config.model.model_name_or_path)
    stage = zero if zero is not None else zero_stage(config.training.deepspeed)
    samples, lengths = _read_lengths(config, Architecture.from_config(checkpoint_config).image_tokens)
    plan = make_plan(config, checkpoint_config, gpus, stage, samples, lengths)
    gpu_bytes = int(gpu_memory * GB)
    remedy = None if plan.fits(gpu_bytes) else find_remedy(plan.setup, gpu_bytes)
    if as_json:
        found = {**plan.to_dict(), "gpu_bytes": gpu_bytes, "fits": plan.fits(gpu_bytes)}
        found["remedy"] = None if remedy is None else {"flags": remedy.flags, "total": remedy.total}
        print(json.dumps(found, indent=2))
    else:
        print(format_plan(plan, gpu_bytes, remedy))
    return 0


def format_plan(plan: Plan, gpu_bytes: int, remedy: Remedy | None) -> str:
    """The plan as a table, the verdict, and the change that would fit."""
    setup = plan.setup
    engine = "no DeepSpeed" if setup.zero is None else f"ZeRO-{setup.zero.stage}"
    lines = [
        f"{setup.gpus} GPU(s), {engine}, {setup.batch} x {setup.length} tokens per GPU, "
        f"{setup.accumulation} accumulation step(s), {setup.bits}-bit base, rank {setup.lora_r}, "
        f"activation checkpointing {'on' if setup.checkpointing else 'off'}",
        "",
        f"{'per GPU':<34}{'GiB':>8}",
    ]
    lines += [f"{name:<34}{size / GIB:>8.2f}" for name, size in plan.parts.items() if size]
    worst = max(plan.moments, key=lambda name: plan.moments[name])
    lines += [f"{'total':<34}{plan.total / GIB:>8.2f}   (worst moment: {worst})"]
    if plan.typical_total is not None:
        lines.append(f"{f'total at {plan.typical_length} tokens (median)':<34}{plan.typical_total / GIB:>8.2f}")
    verdict = "fits" if plan.fits(gpu_bytes) else "does not fit"
    lines += [
        "",
        f"{plan.samples:,} samples, {plan.steps:,} optimizer steps, {plan.tokens_per_step:,} tokens per step, "
        f"{plan.total_tokens:,} in all, {plan.flops:.2e} FLOPs",
        *(f"note: {note}" for note in plan.notes),
        "",
        f"{verdict}: needs about {_gib(plan.total)} of {gpu_bytes / GB:g} GB = {_gib(gpu_bytes)} (GB = 10^9 bytes)",
    ]
    if remedy is not None:
        lines.append(f"would fit: {remedy.flags} ({_gib(remedy.total)})")
    elif not plan.fits(gpu_bytes):
        lines.append("no smaller batch, checkpointing, ZeRO-3, 4 bits, shorter samples or lower rank fits either")
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
