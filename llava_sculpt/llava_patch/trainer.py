"""The original package's LLaVATrainer with LoRASculpt, and with what it gets wrong put right.

Runs under transformers 4.37, peft 0.10 and accelerate 0.28. Masks, regularizer and their saving are those of the main
front end (`train/mixin.py`); here is only what the older Trainer lacks.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llava.train.llava_trainer import LLaVATrainer
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava_sculpt.errors import UserError
from llava_sculpt.llava_patch.arguments import TrainingArguments
from llava_sculpt.names import LORA
from llava_sculpt.train.mixin import LossTerm, SculptMixin

# The original's names; its connector never has LoRA, so Eq. 10 has nothing to act on.
LLM = r"model\.layers\..*"
REGULARIZED_LLM = r"model\.layers\..*\.(q_proj|k_proj|v_proj)"
CONNECTOR_FILE = "non_lora_trainables.bin"


class PatchedTrainer(LossTerm, LLaVATrainer):
    """LLaVATrainer with the learning rates that were given, complete checkpoints, and the engine that was asked for.

    Takes what LLaVA's train() gives it. The model is a PEFT model with LoRA.

    Raises:
        UserError: a setting under which LoRA would not train.
    """

    # This version of the Trainer divides every micro-batch's loss by their number.
    loss_is_scaled_for_ga = False

    def __init__(self, model: Any, args: TrainingArguments, **kwargs: Any) -> None:
        if args.tune_mm_mlp_adapter:
            raise UserError("tune_mm_mlp_adapter: freezes LoRA; leave it out (the connector trains beside LoRA)")
        if not (args.bf16 or args.fp16):
            _tower_in_float32(model)
        if not args.deepspeed:  # DeepSpeed keeps float32 masters by itself
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        super().__init__(model=model, args=args, **kwargs)
        if args.deepspeed:  # it accumulates by itself, and its no_sync refuses ZeRO-2
            self.accelerator.no_sync = lambda model: nullcontext()
        self.add_callback(_Engine(self))

    @property
    def current_gradient_accumulation_steps(self) -> int:
        """Micro-steps of an optimizer step."""
        return self.args.gradient_accumulation_steps

    def create_optimizer(self) -> torch.optim.Optimizer:
        """The original's groups less the empty ones.

        DeepSpeed drops those after the scheduler has recorded one base rate per group; the rates then shift, and the
        connector trains with LoRA's.
        """
        if self.optimizer is None:
            optimizer = super().create_optimizer()
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
        return self.optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained, under every engine; the original copies the frozen model as well."""
        if self.args.should_save:
            self._save(output_dir, {n: p.detach() for n, p in self.model.named_parameters() if p.requires_grad})

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        assert state_dict is not None
        super()._save(output_dir, {name: value for name, value in state_dict.items() if "lora_" in name})
        connector = {name: value.cpu().clone() for name, value in state_dict.items() if "lora_" not in name}
        torch.save(connector, Path(output_dir or self.args.output_dir) / CONNECTOR_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        file = Path(resume_from_checkpoint) / CONNECTOR_FILE
        if not file.is_file():
            raise UserError(f"{file}: missing: the checkpoint was not written by this front end")
        own = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, value in torch.load(file, map_location="cpu", weights_only=True).items():
                own[name].copy_(value)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The file holds numpy's state beside tensors, which torch does not unpickle by itself any more.
        core: Any = np.core
        allowed: list[Any] = [core.multiarray._reconstruct, np.ndarray, np.dtype, np.dtypes.UInt32DType]
        with torch.serialization.safe_globals(allowed):
            super()._load_rng_state(checkpoint)


class SculptTrainer(SculptMixin, PatchedTrainer):
    """PatchedTrainer with LoRASculpt."""

    def save_state(self) -> None:
        """The last call of LLaVA's train() before it writes the adapter itself: the masks go beside it."""
        super().save_state()
        if self.args.should_save:
            self.masking.save(Path(self.args.output_dir))


def make_trainer(model: Any, args: TrainingArguments, **kwargs: Any) -> PatchedTrainer:
    """The trainer of `--method`, called by LLaVA's train() in place of LLaVATrainer."""
    if args.method == LORA:
        return PatchedTrainer(model=model, args=args, **kwargs)
    sculpt = args.to_config(prune=LLM, regularize=REGULARIZED_LLM, connector=None)
    return SculptTrainer(model=model, args=args, sculpt=sculpt, **kwargs)


def load_engine_checkpoint(engine: Any, checkpoint: str) -> None:
    """transformers' deepspeed_load_checkpoint for a checkpoint that holds only what was trained."""
    if not any(Path(checkpoint).glob("global_step*")):
        raise UserError(f"{checkpoint}: not written by DeepSpeed: launch as before, or without --deepspeed")
    path, _ = engine.load_checkpoint(checkpoint, load_module_strict=False)
    if path is None:
        raise UserError(f"{checkpoint}: DeepSpeed cannot read it; was it written by as many processes?")


def _tower_in_float32(model: Any) -> None:
    """train() has rounded the vision tower to float16, also for a run in float32."""
    tower = model.get_vision_tower()
    device = tower.device
    tower.is_loaded = False
    tower.load_model()
    tower.to(device)


class _Engine(TrainerCallback):
    """Says what trains, and refuses to go on with another engine than was asked for."""

    def __init__(self, trainer: PatchedTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        engine = type(self.trainer.model_wrapped).__name__
        # Under accelerate 0.28 a DeepSpeed that is not set up in time is silently replaced by DDP.
        if args.deepspeed and engine != "DeepSpeedEngine":
            raise UserError(f"--deepspeed was given, but the engine is {engine}")
        if args.world_size > 1 and engine == type(self.trainer.model).__name__:
            raise UserError(f"{args.world_size} processes, but no engine joins them")
        if self.trainer.is_world_process_zero():
            print(f"engine: {engine}, {args.world_size} process(es), device {args.device}, {state.max_steps} steps")
