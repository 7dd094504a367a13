"""`llava-sculpt plan`: memory, steps and arithmetic of a run, before anything of it is loaded.

The parts come from `parts.py`. A GPU of "24 GB" is taken as 24 * 10^9 bytes: cards sold as 24 GB show between
22.5 GiB (A10, L4) and 24 GiB (RTX 4090), and 24 * 10^9 bytes are 22.4 GiB. Sizes are printed in GiB.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from llava_sculpt.config import Config, TrainingArguments
from llava_sculpt.config_reader import parse_config, read_deepspeed
from llava_sculpt.data.dataset import LlavaDataset, read_training_file
from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.memory.parts import Architecture, Setup, Zero, activation_peaks, memory_parts, step_flops
from llava_sculpt.model.base_config import check_llava_config
from llava_sculpt.model.checkpoint import known_tower, read_config
from llava_sculpt.model.layout import CLIP_L_336, hf_config, is_original
from llava_sculpt.names import LORASCULPT, PENALTIES, shipped
from llava_sculpt.ranges import out_of_range

MARGIN = 0.9  # of a GPU's memory, that `fastest` fills: the estimate may be that wrong
GIB = 2**30
GB = 10**9
ASSUMED_SAMPLES = 10_000  # the size of the paper's training sets
# What makes a run smaller: same result but slower, then rounded weights, then another result.
SMALLER = (
    "--per_device_train_batch_size 1 with more --gradient_accumulation_steps",
    "--activation_checkpointing true",
    "--deepspeed configs/zero3.json on several GPUs",
    "--bits 4",
    "--deepspeed configs/zero3_offload.json (very slow)",
    "a lower --model_max_length or --lora_r",
)

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
        peaks: bytes of activations at each moment that could be the worst.
        samples, steps: of the training set; optimizer steps of the whole run.
        typical_length: median tokens per sample, None when the data was not read.
        total_tokens: of the whole run; without data every sample counts with `setup.length`.
        notes: what the reader should know about this estimate.
    """

    setup: Setup
    parts: dict[str, int]
    peaks: dict[str, int]
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

    def setting(self) -> str:
        """How a step is computed, as flags of training."""
        setup = self.setup
        words = f"--per_device_train_batch_size {setup.batch} --gradient_accumulation_steps {setup.accumulation} "
        words += f"--activation_checkpointing {'true' if setup.checkpointing else 'false'}"
        if setup.checkpointing > 1:
            words += f" --activation_checkpointing_kwargs '{json.dumps({'every_n_layers': setup.checkpointing})}'"
        return words

    def to_dict(self) -> dict[str, Any]:
        """Everything, JSON-serialisable; memory in bytes."""
        worst = max(self.peaks, key=lambda name: self.peaks[name])
        return {
            "parts": self.parts,
            "total": self.total,
            "typical_total": self.typical_total,
            "worst_moment": worst,
            "moments": self.peaks,
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
            "checkpoint_every": self.setup.checkpointing,
            "trainable_parameters": self.setup.trainable,
            "notes": list(self.notes),
        }


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
    is_sculpt = sculpt.method == LORASCULPT
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
        checkpointing=_checkpointing(arguments),
        unlabelled=_unlabelled(lengths or (), cut, architecture.image_tokens),
    )
    steps = config.optimizer_steps(samples, gpus)
    samples_seen = steps * setup.batch * setup.accumulation * gpus
    return Plan(
        setup=setup,
        parts=memory_parts(setup),
        peaks=activation_peaks(setup),
        samples=samples,
        steps=steps,
        typical_length=int(statistics.median(cut)) if cut else None,
        total_tokens=round(samples_seen * (statistics.fmean(cut) if cut else setup.length)),
        notes=tuple(_notes(config, setup, read_lengths=bool(cut))),
    )


def _checkpointing(arguments: TrainingArguments) -> int:
    """Every how many decoder layers one is checkpointed; 0: none is."""
    options: Any = arguments.activation_checkpointing_kwargs or {}
    return int(options.get("every_n_layers", 1)) if arguments.activation_checkpointing else 0


def _unlabelled(lengths: Sequence[int], cut: Sequence[int], image_tokens: int) -> int:
    """So many tokens less than the longest sample has the longest text. (Lengths of samples without image: below 0.)"""
    text = [n - image_tokens * (length > 0) for n, length in zip(cut, lengths, strict=True)]
    return max(cut) - max(text) if cut else image_tokens


def fastest(plan: Plan, gpu_bytes: int) -> Plan | None:
    """The plan of the same run, global batch and steps, with the activation checkpointing and the split of a step
    that are fastest on a GPU of so many bytes; None if nothing fits there.

    That is the one of least arithmetic, then the largest micro-batch, among those that need `MARGIN` of the memory at
    most, and the plan's own if it fits at all. Under ZeRO-3 the largest micro-batch comes first: every micro-step
    gathers all weights.
    """
    setup = plan.setup
    own = setup.batch * setup.accumulation
    by_speed = []
    for batch in (size for size in range(1, own + 1) if own % size == 0):
        for checkpointing in range(setup.architecture.layers + 1):
            other = dataclasses.replace(setup, batch=batch, accumulation=own // batch, checkpointing=checkpointing)
            by_speed.append((-batch * (setup.stage == 3), step_flops(other), -batch, checkpointing, other))
    for *_, other in sorted(by_speed, key=lambda entry: entry[:4]):
        parts = memory_parts(other)
        if sum(parts.values()) <= (1 if other == setup else MARGIN) * gpu_bytes:
            return dataclasses.replace(plan, setup=other, parts=parts, peaks=activation_peaks(other))
    return None


def use(plan: Plan, arguments: TrainingArguments) -> None:
    """Let a training have the plan's split of a step and its activation checkpointing."""
    setup = plan.setup
    arguments.per_device_train_batch_size = setup.batch
    arguments.gradient_accumulation_steps = setup.accumulation
    arguments.activation_checkpointing = setup.checkpointing > 0
    options: dict[str, Any] = dict(cast("dict[str, Any] | None", arguments.activation_checkpointing_kwargs) or {})
    options.pop("every_n_layers", None)
    if setup.checkpointing > 1:
        options["every_n_layers"] = setup.checkpointing
    arguments.activation_checkpointing_kwargs = options or None
    if arguments.deepspeed_plugin is not None:  # which has taken them over already
        arguments.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": setup.batch,
            "gradient_accumulation_steps": setup.accumulation,
        }


def check_fits(plan: Plan, gpu_bytes: int) -> None:
    """Do nothing if the plan fits a GPU of so many bytes.

    Raises:
        UserError: it does not; one message with what it needs and what makes a run smaller.
    """
    if not plan.fits(gpu_bytes):
        raise UserError(
            f"this run needs about {_gib(plan.total)} per GPU and the GPU has {_gib(gpu_bytes)}; what makes it "
            f"smaller, the least harmful first: {'; '.join(SMALLER)} "
            "(`llava-sculpt plan` shows the parts; --ignore_plan true starts it all the same)"
        )


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
    return read_deepspeed(deepspeed).get("zero_optimization", {}).get("stage", 0) if deepspeed else None


def _zero(deepspeed: str | dict[str, Any] | None, stage: int, hidden: int) -> Zero:
    """Bucket sizes of the configuration; another stage than it names, or none, gets this repository's."""
    here = isinstance(deepspeed, dict) or (deepspeed is not None and Path(shipped(deepspeed)).exists())
    section: Any = read_deepspeed(deepspeed).get("zero_optimization", {}) if deepspeed and here else {}
    if section.get("stage") != stage:
        return Zero(stage, reduce_bucket=50_000_000, overlap=True)  # as in configs/zero*.json

    def elements(key: str, default: int, auto: int) -> int:
        value = section.get(key, default)
        return auto if value == "auto" else int(float(value))

    def offloads(key: str) -> bool:
        return (section.get(key) or {}).get("device", "none") != "none"

    # DeepSpeed's defaults; "auto" is what Hugging Face's integration puts in its place.
    return Zero(
        stage,
        reduce_bucket=elements("reduce_bucket_size", 500_000_000, hidden * hidden),
        overlap=bool(section.get("overlap_comm", stage == 3)),
        prefetch_bucket=elements("stage3_prefetch_bucket_size", 50_000_000, hidden * hidden * 9 // 10),
        persistence_threshold=elements("stage3_param_persistence_threshold", 100_000, 10 * hidden),
        offload_weights=offloads("offload_param"),
        offload_optimizer=offloads("offload_optimizer"),
    )


def read_checkpoint_config(name_or_path: str) -> dict[str, Any]:
    """config.json of a local folder, of a cached Hub model, or as known for LLaVA-1.5-7B and 13B.

    Raises:
        UserError: none of these.
    """
    folder = Path(shipped(name_or_path))
    if not (folder / "config.json").is_file() and name_or_path.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache

        try:
            cached: object = try_to_load_from_cache(name_or_path, "config.json")
        except ValueError:  # not a possible Hub id
            cached = None
        folder = Path(cached).parent if isinstance(cached, str) else folder
    if (folder / "config.json").is_file():
        found = read_config(folder)
        if is_original(found):
            return hf_config(found, known_tower(folder, found["mm_vision_tower"]))
        if found.get("model_type") != "llava":
            raise UserError(f"{folder / 'config.json'}: not a LLaVA-1.5 model's (model_type is not 'llava')")
        check_llava_config(found, folder / "config.json")
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


def _read_lengths(config: Config, image_tokens: int) -> tuple[int, list[int] | None]:
    """Samples, and tokens of each, of the training file; assumed and None where it or the tokenizer is missing."""
    path = Path(config.data.data_path)
    if not path.is_file():
        return ASSUMED_SAMPLES, None
    base = Path(config.model.model_name_or_path)
    if not all((base / name).is_file() for name in ("tokenizer.model", "preprocessor_config.json")):
        return len(read_training_file(path)), None
    tokenizer, preprocessor = LlavaTokenizer.from_dir(base), ImagePreprocessor.from_dir(base)
    dataset = LlavaDataset(path, None, tokenizer, preprocessor, config.training.model_max_length, image_tokens)
    return len(dataset), dataset.modality_lengths


def run_plan(argv: list[str], gpus: int, gpu_memory: float, zero: int | None, *, as_json: bool) -> int:
    """Print the plan of a training command line; returns 0, whether it fits or not.

    As JSON: the keys of `Plan.to_dict`, `gpu_bytes`, `fits`, `hints`: what makes the run smaller if it does not, and
    `fastest`: the same keys of the fastest setting that fits, with its flags as `setting`; null if none does.

    Args:
        argv: `--config FILE.yaml` and any flag of training.
        gpu_memory: of one GPU in GB, 10^9 bytes.
        zero: ZeRO stage in place of the configuration's.

    Raises:
        UserError: bad configuration, unknown model, unreadable data, or impossible numbers of GPUs or GB.
    """
    numbers = {
        "gpus": out_of_range(gpus, int, "[1, inf)"),
        "gpu_memory": out_of_range(gpu_memory, float, "(0, 1000000]"),
    }
    if any(numbers.values()):
        raise UserError(f"--{name}: {wrong}" for name, wrong in numbers.items() if wrong)
    config = parse_config(argv, elsewhere=True)
    checkpoint_config = read_checkpoint_config(config.model.model_name_or_path)
    stage = zero if zero is not None else zero_stage(config.training.deepspeed)
    samples, lengths = _read_lengths(config, Architecture.from_config(checkpoint_config).image_tokens)
    plan = make_plan(config, checkpoint_config, gpus, stage, samples, lengths)
    gpu_bytes = int(gpu_memory * GB)
    best = fastest(plan, gpu_bytes)
    if config.training.plan == "auto":
        plan = best or plan
    if as_json:
        fits = plan.fits(gpu_bytes)
        found = {**plan.to_dict(), "gpu_bytes": gpu_bytes, "fits": fits, "hints": [] if fits else SMALLER}
        found["fastest"] = None if best is None else {**best.to_dict(), "setting": best.setting()}
        print(json.dumps(found, indent=2))
    else:
        print(format_plan(plan, best, gpu_bytes))
    return 0


def format_plan(plan: Plan, best: Plan | None, gpu_bytes: int) -> str:
    """The plan as a table, the verdict, the fastest setting that fits and what makes a run smaller that does not."""
    setup = plan.setup
    checkpointing = {0: "off", 1: "on"}.get(setup.checkpointing, f"every {setup.checkpointing} layers")
    engine = "no DeepSpeed" if setup.zero is None else f"ZeRO-{setup.zero.stage}"
    lines = [
        f"{setup.gpus} GPU(s), {engine}, {setup.batch} x {setup.length} tokens per GPU, "
        f"{setup.accumulation} accumulation step(s), {setup.bits}-bit base, rank {setup.lora_r}, "
        f"activation checkpointing {checkpointing}",
        "",
        f"{'per GPU':<34}{'GiB':>8}",
    ]
    lines += [f"{name:<34}{size / GIB:>8.2f}" for name, size in plan.parts.items() if size]
    worst = max(plan.peaks, key=lambda name: plan.peaks[name])
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
    if best is not None and best.setup != setup:
        lines += [
            f"fastest setting that fits (--plan auto): {best.setting()}",
            f"  {best.flops / plan.flops:.2f} of the FLOPs, {_gib(best.total)}",
        ]
    elif best is not None:
        lines += ["this is the fastest setting that fits"]
    if not plan.fits(gpu_bytes):
        lines += ["what makes a run smaller, the least harmful first:", *(f"  {change}" for change in SMALLER)]
    return "\n".join(lines)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
