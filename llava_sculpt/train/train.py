"""Fine-tune LLaVA-1.5 with LoRASculpt or a baseline. The same file runs under three launchers:

    python -m llava_sculpt.train.train --config configs/tiny/iconqa_sculpt.yaml
    torchrun --nproc_per_node 4 llava_sculpt/train/train.py --config configs/iconqa_sculpt.yaml
    deepspeed --num_gpus 4 llava_sculpt/train/train.py --config configs/iconqa_sculpt.yaml

Flags carry LLaVA's names where LLaVA has them; those of the method begin with --sculpt_. Any flag overrides the YAML;
--help lists them.
An interrupted run continues when the same command is given again.
"""

from __future__ import annotations

from llava_sculpt.train.interrupt import INTERRUPTED, exit_on_signals

if __name__ == "__main__":
    exit_on_signals()  # the imports below take seconds

import os
import resource
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, set_seed

from llava_sculpt.artifacts.model_card import CARD, write_model_card
from llava_sculpt.artifacts.open import open_checkpoint
from llava_sculpt.config import Config
from llava_sculpt.config_reader import help_text, parse_config, without_token
from llava_sculpt.data.collator import TrainCollator
from llava_sculpt.data.dataset import LlavaDataset, validate_dataset
from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.memory.plan import check_fits, fastest, make_plan, use
from llava_sculpt.model.checkpoint import BaseCheckpoint
from llava_sculpt.model.files import ADAPTER_FILE, MASKS_FILE, read_tensors
from llava_sculpt.model.load import check_bits, load_base
from llava_sculpt.model.lora import CONNECTOR_TARGETS, LLM_TARGETS, REGULARIZED_LLM, inject_lora
from llava_sculpt.model.whole import seal_run
from llava_sculpt.names import LORASCULPT, METHODS
from llava_sculpt.progress import panel
from llava_sculpt.records import file_sha256, versions
from llava_sculpt.sculpt import SculptSchedule
from llava_sculpt.train.callback import check_masks
from llava_sculpt.train.console import TrainingBar, closing_block, say
from llava_sculpt.train.forgetting import ForgettingProbe, probe_pictures
from llava_sculpt.train.run_folder import Checkpoint, OpenRun, open_run, saving
from llava_sculpt.train.trainer import LLaVASculptTrainer, LLaVATrainer
from llava_sculpt.train.zero import engine_of_checkpoint, everyones, leave_together


def main(argv: list[str] | None = None) -> int:
    """Run one training; returns the exit code (0 done, 2 bad input, 130 interrupted)."""
    try:
        arguments = sys.argv[1:] if argv is None else argv
        if {"-h", "--help"} & set(arguments):
            print(help_text())
            return 0
        return train(parse_config(arguments), arguments)
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2


def train(config: Config, arguments: Sequence[str]) -> int:
    """Check everything, then load, train and save. See `main` for the exit code.

    Args:
        arguments: the command line, for run.json.

    Raises:
        UserError: bad configuration, data, checkpoint or output folder; nothing has been written over.
    """
    check_bits(config.model.bits)
    checkpoint = open_checkpoint(config.model.model_name_or_path)
    data = config.data
    (dataset, images), held_out = _open_dataset(config, checkpoint, data.data_path, data.image_folder), None
    if data.eval_data_path is not None:
        eval_folder = data.eval_image_folder or data.image_folder
        held_out, _ = _open_dataset(config, checkpoint, data.eval_data_path, eval_folder)
    steps = config.optimizer_steps(len(dataset), config.training.world_size)
    _check_against_data(config, checkpoint, dataset, steps)
    _check_memory(config, checkpoint, dataset)

    output_dir = Path(config.training.output_dir)
    record = _describe(config, checkpoint, len(dataset), steps, images)
    record["command"] = f"python -m llava_sculpt.train.train {shlex.join(without_token(arguments)[0])}"
    with open_run(output_dir, record, claims=config.training.should_save) as run:
        if run.finished:
            if config.training.process_index == 0:
                print(f"{output_dir}: this run is already finished")
                if not (output_dir / CARD).exists():  # the last thing that is written
                    write_model_card(output_dir)
            return 0
        if run.checkpoint is not None:
            _check_resume(config, run.checkpoint, steps)
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no warning of DeepSpeed's that there is no GPU
        trainer = build_trainer(config, checkpoint, dataset, held_out)
        trainer.resuming = run.checkpoint
        trainer.add_callback(_SayEngine(trainer, run))
        started = time.time()
        interruptible = _StopOnSignal() if config.training.world_size == 1 else nullcontext()
        with interruptible as interruption, TrainingBar(trainer, shown=not config.training.disable_tqdm):
            if interruption is not None:
                trainer.add_callback(interruption)
            trainer.train(None if run.checkpoint is None else str(run.checkpoint.path))
        if interruption is not None and interruption.received:
            print(
                f"\n{output_dir}: stopped at step {trainer.state.global_step} of {trainer.state.max_steps}; "
                "give the same command again to continue",
                file=sys.stderr,
            )
            return INTERRUPTED
        with saving(output_dir, "the finished run"):
            trainer.save_model(_internal_call=True)  # without its upload, which would come before run.json is done
            trainer.save_state()
            if trainer.is_world_process_zero():
                record |= {
                    "status": "finished",
                    "engine": type(trainer.model_wrapped).__name__,
                    "train_seconds": round(time.time() - started, 1),
                    "peak_memory_bytes": peak_memory(),
                }
                seal_run(output_dir, record)
            trainer.create_model_card()
        if trainer.is_world_process_zero():
            losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
            with panel("trained"):
                print(closing_block(config, record, losses))
    if config.training.push_to_hub:
        try:
            trainer.push_to_hub()
        except OSError as error:  # the Hub client's errors are OSErrors too
            raise UserError(
                f"{output_dir}: the run is finished and saved, but could not be uploaded: {error}. "
                f"By hand: hf upload REPOSITORY {output_dir} --exclude 'checkpoint-*'"
            ) from error
    leave_together()
    return 0


def _open_dataset(
    config: Config, checkpoint: BaseCheckpoint, data_path: str, image_folder: str
) -> tuple[LlavaDataset, str]:
    """The samples, and the fingerprint of their images."""
    images = validate_dataset(data_path, image_folder, allow_outside=config.data.allow_outside).images
    dataset = LlavaDataset(
        data_path,
        image_folder,
        LlavaTokenizer.from_dir(checkpoint.path),
        ImagePreprocessor.from_dir(checkpoint.path),
        config.training.model_max_length,
        checkpoint.image_tokens,
    )
    return dataset, images


def _check_against_data(config: Config, checkpoint: BaseCheckpoint, dataset: LlavaDataset, steps: int) -> None:
    problems = []
    plugin = config.training.deepspeed_plugin
    engine = None if plugin is None else plugin.hf_ds_config
    stage = None if engine is None else engine.get_value("zero_optimization.stage", 0)
    if stage not in (None, 2, 3):
        problems.append(f"deepspeed: zero_optimization.stage must be 2 or 3, got {stage}")
    for part in ("offload_param", "offload_optimizer"):
        if engine is not None and engine.get_value(f"zero_optimization.{part}.device") == "nvme":
            problems.append(f"deepspeed: {part} to nvme is not supported; use cpu or none")
    if config.model.bits != 16 and stage == 3:
        problems.append(
            f"bits: {config.model.bits} does not go with ZeRO-3 (the regularizer needs whole weights, and ZeRO-3 would "
            "cut up the packed bytes); use configs/zero2.json, or bits: 16"
        )
    widths = [width for width in checkpoint.input_widths if width % 64]
    if config.model.bits == 4 and widths and not torch.cuda.is_available():
        problems.append(
            f"bits: 4 on a CPU needs matrices whose input width is a multiple of 64, this model has {widths[0]} "
            "(bitsandbytes reads others back wrongly there); use bits: 8 or 16"
        )
    if METHODS[config.sculpt.method].whole_weight and stage == 3:
        problems.append(
            f"method: {config.sculpt.method} does not go with ZeRO-3 (it needs whole weights); use configs/zero2.json"
        )
    if config.model.lora_r > checkpoint.smallest_dimension:
        problems.append(
            f"lora_r: {config.model.lora_r} is above the smallest dimension of the adapted matrices "
            f"({checkpoint.smallest_dimension})"
        )
    if config.prunes:
        try:
            SculptSchedule(config.sculpt.sculpt_warmup_steps, steps)
        except ValueError as error:
            problems.append(f"sculpt_warmup_steps: {error}")
    if config.training.forgetting_probe and not probe_pictures(dataset.records, 1):
        problems.append(f"forgetting_probe: {config.data.data_path} has no pictures to ask about; set it to 0")
    if problems:
        raise UserError(problems)


def _check_memory(config: Config, checkpoint: BaseCheckpoint, dataset: LlavaDataset) -> None:
    """Refuse a run that does not fit the GPU; with `--plan auto` let it first have the fastest setting that does."""
    memory, auto = gpu_memory(), config.training.plan == "auto"
    first = config.training.process_index == 0
    if memory is None:
        if auto and first:
            say("plan: no GPU here: a step is computed as given")
        return
    if config.training.ignore_plan and not auto:
        return
    plugin = config.training.deepspeed_plugin
    stage = None if plugin is None else plugin.zero_stage
    plan = make_plan(
        config, checkpoint.config, config.training.world_size, stage, len(dataset), dataset.modality_lengths
    )
    if auto and (best := fastest(plan, min(everyones(memory)))) is not None:  # the same one in every process
        use(best, config.training)
        if first:
            say(f"plan: fastest setting that fits: {best.setting()}")
        return
    if not config.training.ignore_plan:
        check_fits(plan, memory)


def gpu_memory() -> int | None:
    """Bytes of this process's GPU, None without one."""
    return torch.cuda.get_device_properties("cuda").total_memory if torch.cuda.is_available() else None


def _check_resume(config: Config, checkpoint: Checkpoint, steps: int) -> None:
    read_tensors(checkpoint.path / ADAPTER_FILE)
    _check_engine(config, checkpoint.path)
    if config.prunes:
        schedule = SculptSchedule(config.sculpt.sculpt_warmup_steps, steps)
        check_masks(checkpoint.path, checkpoint.step, schedule, config.sculpt.sculpt_density)


def _check_engine(config: Config, checkpoint: Path) -> None:
    """DeepSpeed's optimizer state is cut for one ZeRO stage and one number of processes."""
    plugin, there = config.training.deepspeed_plugin, engine_of_checkpoint(checkpoint)
    here = None if plugin is None else (plugin.zero_stage, config.training.world_size)
    if there != here:
        names = [
            f"DeepSpeed ZeRO-{engine[0]} with {engine[1]} processes" if engine else "no DeepSpeed"
            for engine in (there, here)
        ]
        raise UserError(f"{checkpoint}: written by {names[0]}, this launch is {names[1]}: launch it as before")


def _describe(config: Config, checkpoint: BaseCheckpoint, samples: int, steps: int, images: str) -> dict[str, Any]:
    base = {
        "path": config.model.model_name_or_path,
        "fingerprint": checkpoint.fingerprint(),
        "weights": checkpoint.weights_fingerprint(),
        "architecture": checkpoint.architecture(),
    }
    data = {"path": config.data.data_path, "samples": samples, "sha256": file_sha256(config.data.data_path)}
    arguments = config.training
    batch = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    return {
        "identity": config.identity()
        | {"base": base["fingerprint"], "data": data["sha256"], "global_batch_size": batch},
        "config": config.to_dict(),
        "base": base,
        "data": data,
        "inputs": {
            "tokenizer": file_sha256(checkpoint.path / "tokenizer.model"),
            "preprocessor": file_sha256(checkpoint.path / "preprocessor_config.json"),
            "images": images,
        },
        "steps": steps,
        "global_batch_size": batch,
        "world_size": arguments.world_size,
        "seed": arguments.seed,
        "versions": versions(),
    }


def build_trainer(
    config: Config, checkpoint: BaseCheckpoint, dataset: LlavaDataset, held_out: LlavaDataset | None = None
) -> LLaVATrainer:
    """Load the base model, attach LoRA and return the Trainer of the configured method."""
    arguments, model_arguments = config.training, config.model
    dtype = torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32
    model = load_base(
        checkpoint,
        dtype,
        device=arguments.device,
        bits=model_arguments.bits,
        double_quant=model_arguments.double_quant,
        quant_type=model_arguments.quant_type,
        vision_tower=model_arguments.vision_tower,
    )
    # Before LoRA's random start: the original seeds after it, and no run can be repeated.
    set_seed(arguments.seed)
    peft_model = inject_lora(
        model,
        r=model_arguments.lora_r,
        lora_alpha=config.lora_alpha,
        dropout=model_arguments.lora_dropout,
        connector=model_arguments.connector,
        use_dora=config.sculpt.method == "dora",
    )
    if arguments.deepspeed_plugin is not None:
        # DeepSpeed keeps float32 masters itself; ZeRO-3 asks for working copies of one dtype.
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    collator = TrainCollator(
        checkpoint.pad_token_id,
        checkpoint.image_token_id,
        checkpoint.image_tokens,
        checkpoint.image_size,
        arguments.model_max_length,
    )
    if config.sculpt.method == LORASCULPT:
        connector = CONNECTOR_TARGETS if model_arguments.connector == "sculpt" else None
        sculpt = config.sculpt.to_config(prune=LLM_TARGETS, regularize=REGULARIZED_LLM, connector=connector)
        trainer: LLaVATrainer = LLaVASculptTrainer(peft_model, config, dataset, collator, held_out, sculpt=sculpt)
    else:
        trainer = LLaVATrainer(peft_model, config, dataset, collator, held_out)
    if wanted := arguments.forgetting_probe:
        trainer.add_callback(ForgettingProbe(trainer, dataset, collator, wanted))
    return trainer


def peak_memory() -> int:
    """Peak bytes of this process: allocated on the GPU if there is one, else resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class _StopOnSignal(TrainerCallback):
    """The first ctrl-C (or TERM) ends the current step, saves a checkpoint and stops; the second does what it did
    before (in this script: ends the process at once).

    A context: after it the process handles signals as before.
    """

    def __init__(self) -> None:
        self.received = False

    def __enter__(self) -> _StopOnSignal:
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self.received:
            signal.signal(number, self._before[signal.Signals(number)])
            signal.raise_signal(number)
            return
        self.received = True
        print("\nstopping after this step (again: at once)", file=sys.stderr)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.received and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True


class _SayEngine(TrainerCallback):
    """Says what trains, and what it continues from."""

    def __init__(self, trainer: LLaVATrainer, run: OpenRun) -> None:
        self.trainer, self.run = trainer, run

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self.trainer.is_world_process_zero():
            return
        engine = type(self.trainer.model_wrapped).__name__
        say(f"engine: {engine}, {args.world_size} process(es), device {args.device}, {state.max_steps} steps")
        if self.run.checkpoint is None:
            return
        folder = self.run.checkpoint.path
        masks = "with its masks" if (folder / MASKS_FILE).is_file() else "without masks"
        say(f"step {state.global_step}: resumed from {folder} {masks}")
        split = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.world_size
        if self.run.split != split:
            before, now = (" x ".join(map(str, numbers)) for numbers in (self.run.split or (), split))
            say(f"batch x accumulation x processes was {before}, is now {now}: the same steps, not the same bits")


if __name__ == "__main__":
    sys.exit(main())
