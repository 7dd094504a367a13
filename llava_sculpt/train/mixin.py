"""The method in front of any Hugging Face Trainer: a loss term, and masks that live in its checkpoints.

`SculptMixin` attaches LoRASculpt to the Trainer of another model, TRL's included:

    class MyTrainer(SculptMixin, SFTTrainer): ...
    trainer = MyTrainer(model, args=..., peft_config=..., sculpt=SculptConfig(density=0.1, warmup_steps=100))

LLaVA's own trainers, here and in `llava_patch`, are made the same way. Nothing here needs more than transformers 4.37
has, except the two attributes that say how the loss is divided under gradient accumulation.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed as dist
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from llava_sculpt.config import SculptConfig
from llava_sculpt.errors import UserError
from llava_sculpt.model.lora import lora_pairs, matching_pairs
from llava_sculpt.train.callback import SculptCallback
from llava_sculpt.train.regularizer import ConflictRegularizer, Regularizer

_Base: Any = Trainer if TYPE_CHECKING else object


class LossTerm(_Base):
    """Adds a regularizer to the loss once per optimizer step, and logs it beside the task's loss.

    It is added in the micro-step that ends the optimizer step, so it costs and counts the same however the step is
    split by gradient accumulation. Each process adds its share; gradient averaging over the processes makes it the
    whole term. Training stops with a UserError at the first optimizer step whose loss or gradient norm is not finite.

    Attributes:
        regularizer: the term; None adds nothing.
    """

    regularizer: Regularizer | None = None
    _with_term = False
    _task_loss: torch.Tensor | float = 0.0
    _step_loss: torch.Tensor | float = 0.0
    _task_steps = 0

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The Trainer's step; the loss that it returns gets the value of the term, which backward has computed."""
        self._with_term = False
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self._with_term and self.regularizer is not None:
            loss = loss + self.regularizer.value()
        if self.accelerator.sync_gradients:  # the task's loss is a sum over the micro-steps before
            self._step_loss = self._task_loss + loss
            if not hasattr(super(), "_get_grad_norm"):  # before transformers 5
                self._stop_unless_finite({"loss": self._step_loss})
        return loss

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's, before the optimizer's step (under DeepSpeed behind it). Transformers 5 calls it."""
        norm = super()._get_grad_norm(*args, **kwargs)
        # The scaled gradients of fp16 may overflow: that step is skipped, and the scale lowered.
        checked = norm is not None and not self.args.fp16
        self._stop_unless_finite({"loss": self._step_loss} | ({"gradient norm": norm} if checked else {}))
        return norm

    def _stop_unless_finite(self, values: dict[str, torch.Tensor | float]) -> None:
        """Called once per optimizer step, before anything of it is saved. Collective: all processes stop together.

        It is the one place where the host waits for the device in a step that is not logged.
        """
        found = torch.stack([torch.as_tensor(v, device=self.args.device).float() for v in values.values()])
        bad = (~torch.isfinite(found)).float()
        if dist.is_initialized():
            dist.all_reduce(bad)
        what = next((name for name, wrong in zip(values, bad.tolist(), strict=True) if wrong), None)
        if what is None:
            return
        last = get_last_checkpoint(self.args.output_dir)
        precision = "fp16 that overflows (try bf16), " if self.args.fp16 else ""
        raise UserError(
            f"step {self.state.global_step + 1}: the {what} is not finite: the training has diverged. Likely causes: a "
            f"learning rate that is too high ({self.args.learning_rate:g}), {precision}broken samples or a broken base "
            f"model. {f'The last checkpoint before it is {last}' if last else 'There is no checkpoint before it'}; "
            "train with other settings in another output_dir"
        )

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, *args: Any, **kwargs: Any
    ) -> Any:
        """The Trainer's loss, with the term's gradient (not its value) where it is due; evaluation is left alone."""
        regularizer = self.regularizer if model.training and self.accelerator.sync_gradients else None
        term = regularizer() if regularizer is not None and regularizer.before_forward else None
        result: Any = super().compute_loss(model, inputs, return_outputs, *args, **kwargs)
        if not model.training:
            return result
        if regularizer is not None and not regularizer.before_forward:
            term = regularizer()
        loss = result[0] if return_outputs else result
        divisor = self._loss_divisor(args[0] if args else kwargs.get("num_items_in_batch"))
        self._task_loss = self._task_loss + loss.detach() / divisor
        if self.accelerator.sync_gradients:
            self._task_steps += 1
        if term is None:
            return result
        self._with_term = True
        loss = loss + term * divisor
        return (loss, result[1]) if return_outputs else loss

    def _loss_divisor(self, num_items_in_batch: torch.Tensor | int | None) -> int:
        """What the Trainer divides the result of `compute_loss` by: the number of micro-steps, unless it is a part of
        the whole step's mean already. (The rule of `Trainer.training_step`.)"""
        scaled = self.loss_is_scaled_for_ga
        if scaled is None:
            by_model = self.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_model or self.compute_loss_func is not None
        return 1 if scaled else self.current_gradient_accumulation_steps

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the task's loss and the value of the regularizer to what the Trainer logs of training."""
        if "loss" in logs and self._task_steps > 0:
            task_loss = torch.as_tensor(self._task_loss, device=self.args.device).reshape(1)
            logs["task_loss"] = self.accelerator.gather(task_loss).mean().item() / self._task_steps
            self._task_loss, self._task_steps = 0.0, 0
            if self.regularizer is not None:
                logs.update(self.regularizer.values())
        super().log(logs, *args, **kwargs)


class SculptMixin(LossTerm):
    """LoRASculpt in front of a Trainer class: `class MyTrainer(SculptMixin, Trainer)`.

    Adds the conflict regularizer to the loss; makes the masks, saves them with every checkpoint and final adapter, and
    restores them at a resume; logs the density. At density 1 nothing is pruned and there are no masks.

    Args:
        sculpt: the method's settings; its patterns say which LoRA layers are pruned and which regularized.
        Everything else goes to the Trainer, which must hold a PEFT model with LoRA after its own `__init__`.

    Attributes:
        masking: the callback that makes and holds the masks.

    Raises:
        UserError: a pattern matches no LoRA layer, or the model has DoRA.
    """

    def __init__(self, *args: Any, sculpt: SculptConfig, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pairs = lora_pairs(self.model)
        if any(pair.magnitude is not None for pair in pairs):
            raise UserError("LoRASculpt prunes LoRA's A and B; the model has DoRA (use_dora), which it does not cover")
        self.regularizer = ConflictRegularizer(pairs, sculpt)
        pruned = matching_pairs(pairs, sculpt.prune, "prune") if sculpt.density < 1 else []
        self.masking = SculptCallback(pruned, sculpt.density, sculpt.warmup_steps)
        if pruned:
            self.add_callback(self.masking)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train, or continue from a checkpoint folder (True: the last one in output_dir) with its masks.

        Raises:
            UserError: the checkpoint's masks are not the ones its weights were trained with.
        """
        folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        self.masking.resume_from = Path(folder) if folder else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.masking.parameters:
            logs["density"] = self.masking.measured_density()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        self.masking.save(Path(output_dir or self.args.output_dir))
