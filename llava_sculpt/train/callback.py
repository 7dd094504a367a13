"""Algorithm 1 as a Trainer callback: masks are made once, held for good, saved with every checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from transformers import TrainerCallback, TrainerControl, TrainerState

from llava_sculpt.errors import UserError
from llava_sculpt.model.files import ADAPTER_FILE, MASKS_FILE, read_tensors, write_tensors
from llava_sculpt.model.lora import LoraPair
from llava_sculpt.sculpt import SculptSchedule, kept_count, magnitude_mask
from llava_sculpt.train.console import say
from llava_sculpt.train.zero import full_value, nonzero_entries, write_masked


class SculptCallback(TrainerCallback):
    """Sparsifying for Redundancy Reduction (Eq. 2-3) inside any Trainer.

    Before the forward pass of optimizer step T_warmup every pruned matrix gets its mask from the current weights.
    From then on pruned entries are exactly 0: their weights, master copies and optimizer moments are cleared once,
    and a hook keeps their gradients at 0, so that no optimizer moves them and clipping does not count them.

    Args:
        pairs: the LoRA pairs to prune (the LLM's; the connector is never pruned).
        density: fraction kept per matrix.
        warmup_steps: optimizer steps before the masks are made, or a fraction of training below 1.

    Attributes:
        masks: bool tensors by key in adapter_model.safetensors; empty before the mask step.
        resume_from: checkpoint whose masks are restored when training begins.
    """

    def __init__(self, pairs: list[LoraPair], density: float, warmup_steps: float) -> None:
        self.density = density
        self.warmup_steps = warmup_steps
        self.parameters = dict(entry for pair in pairs for entry in pair.parameters())
        self.masks: dict[str, torch.Tensor] = {}
        self.resume_from: Path | None = None
        self._entries = sum(parameter.numel() for parameter in self.parameters.values())
        self._schedule: SculptSchedule | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        try:
            self._schedule = SculptSchedule(self.warmup_steps, state.max_steps)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.resume_from is not None and not self.masks:
            check_masks(self.resume_from, state.global_step, self._schedule, self.density)
            self._load(self.resume_from, args.device)

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        assert self._schedule is not None
        if state.global_step == self._schedule.mask_step and not self.masks:
            optimizer = kwargs["optimizer"]
            if isinstance(optimizer, AcceleratedOptimizer):
                optimizer = optimizer.optimizer
            for key, parameter in self.parameters.items():
                try:
                    mask = magnitude_mask(full_value(parameter), self.density)
                except ValueError as error:
                    raise UserError(f"step {state.global_step}: {key}: {error}; the training has diverged") from error
                write_masked(parameter, mask, optimizer)
                self._hold(key, mask)
            if state.is_world_process_zero:
                matrices = f"masks of {len(self.masks)} matrices"
                say(f"step {state.global_step}: made the {matrices}, density {self.density:g} each, kept from here on")

    def _hold(self, key: str, mask: torch.Tensor) -> None:
        self.masks[key] = mask
        # One launch, and no zero that is sent to the device each time (for which the host would wait).
        zero = torch.zeros((), dtype=self.parameters[key].dtype, device=mask.device)
        self.parameters[key].register_hook(lambda gradient: torch.where(mask, gradient, zero))

    def save(self, folder: Path) -> None:
        """Write the masks made so far (bool tensors under the adapter's own keys); nothing before the mask step."""
        if self.masks:
            write_tensors(folder / MASKS_FILE, {key: mask.cpu() for key, mask in self.masks.items()})

    def _load(self, checkpoint: Path, device: torch.device) -> None:
        """Restore the masks of a checkpoint (none before the mask step), after `check_masks` has passed it."""
        if (checkpoint / MASKS_FILE).exists():
            for key, mask in read_tensors(checkpoint / MASKS_FILE).items():
                self._hold(key, mask.to(device))

    def measured_density(self) -> float:
        """Fraction of non-zero entries over all pruned matrices, counted in the weights. Collective under ZeRO-3."""
        return nonzero_entries(self.parameters.values()) / max(self._entries, 1)


def check_masks(checkpoint: Path, step: int, schedule: SculptSchedule, density: float) -> None:
    """Refuse a checkpoint of step `step` whose masks are not the ones its weights were trained with.

    Raises:
        UserError: masks missing, of other matrices, of another density, or not zero where the weights are not.
    """
    file = checkpoint / MASKS_FILE
    if not file.exists():
        if step > schedule.mask_step:
            raise UserError(
                f"{file}: missing, but step {step} is after the mask step {schedule.mask_step}: cannot be resumed"
            )
        return
    masks, weights = read_tensors(file), read_tensors(checkpoint / ADAPTER_FILE)
    for key, mask in masks.items():
        if key not in weights or mask.shape != weights[key].shape:
            raise UserError(f"{file}: {key} is of another model or rank than {ADAPTER_FILE}: cannot be resumed")
        if int(mask.sum()) != kept_count(mask.numel(), density):
            raise UserError(f"{file}: {key} was made for another density than {density}: cannot be resumed")
        if weights[key].masked_select(~mask).any():
            raise UserError(f"{file}: {key} does not belong to {ADAPTER_FILE} (weights off the mask)")
