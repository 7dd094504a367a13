"""LLaVATrainer: what LLaVA needs of a Trainer, and a baseline's loss term. LLaVASculptTrainer: with LoRASculpt."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainerControl, TrainerState

from llava_sculpt.artifacts.model_card import write_model_card
from llava_sculpt.config import Config
from llava_sculpt.data.sampler import ModalityLengthSampler
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import load_connector, save_adapter
from llava_sculpt.model.lora import CONNECTOR, lora_pairs
from llava_sculpt.names import PENALTIES
from llava_sculpt.train.console import LogLines
from llava_sculpt.train.mixin import LossTerm, SculptMixin
from llava_sculpt.train.regularizer import SumRegularizer
from llava_sculpt.train.run_folder import SAVING, Checkpoint, publish_checkpoint, saving
from llava_sculpt.train.zero import gather_working_copies


class LLaVATrainer(LossTerm, Trainer):
    """The Trainer for LoRA on LLaVA.

    Adds to Hugging Face's: a learning rate of its own for the connector, LLaVA's sampler by modality and length, the
    connector in every checkpoint, checkpoints that are complete or not there, the loss term of the configured method,
    and the logs of docs/method.md.

    Args:
        model: PEFT model from `inject_lora`.
        config: the run.
        train_dataset: `LlavaDataset`. eval_dataset: the same of held-out samples, None without evaluation.
        data_collator: `TrainCollator`.

    Attributes:
        resuming: the checkpoint that `train` continues from, to be compared with its files once they are loaded.
    """

    model: PeftModel
    resuming: Checkpoint | None = None
    _tokens: torch.Tensor | int = 0

    def __init__(
        self, model: PeftModel, config: Config, train_dataset: Any, data_collator: Any, eval_dataset: Any = None
    ) -> None:
        self.config = config
        self._dataset = train_dataset
        self._sampler: ModalityLengthSampler | None = None
        self._lrs: dict[str, float] = {}
        self._aside = False
        if config.sculpt.method in PENALTIES and config.sculpt.reg_lambda > 0:
            self.regularizer = SumRegularizer(config.sculpt.method, lora_pairs(model), config.sculpt.reg_lambda)
        super().__init__(model, config.training, data_collator, train_dataset, eval_dataset)
        self.add_callback(_StepFacts(self))
        self.add_callback(_BackwardEndsAtTheConnector(self))
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        self.add_callback(LogLines())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        if not self.config.training.group_by_modality_length:
            return super()._get_train_sampler(train_dataset)
        self._sampler = ModalityLengthSampler(
            self._dataset.modality_lengths,
            self.args.train_batch_size * self.args.gradient_accumulation_steps,
            self.args.world_size,
            self.args.seed,
        )
        return self._sampler

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """One named group per learning rate and weight decay; an empty group is never made.

        (The original makes four groups whatever is in them; DeepSpeed drops the empty ones after the scheduler has
        recorded four base rates, and the connector then trains with LoRA's.)
        """
        if self.optimizer is not None:
            return self.optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        connector_lr = self.config.training.mm_projector_lr
        groups: dict[tuple[str, bool], dict[str, Any]] = {}
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            # The connector's own weights; LoRA on the connector is LoRA.
            kind = "connector" if CONNECTOR in name and "lora_" not in name else "lora"
            lr = connector_lr if kind == "connector" and connector_lr is not None else self.args.learning_rate
            decay = self.args.weight_decay if name in decayed else 0.0
            new = {"params": [], "name": kind, "lr": lr, "weight_decay": decay}
            groups.setdefault((kind, name in decayed), new)["params"].append(parameter)
        optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args)
        # LoRA first: the Trainer logs the first group's rate as the learning rate.
        self.optimizer = optimizer_class([groups[key] for key in sorted(groups, reverse=True)], **options)
        return self.optimizer

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        """Note this process's tokens (the Trainer would gather all processes' in every micro-step, and wait)."""
        counted = self.args.include_num_input_tokens_seen
        if counted != "no":
            padded = counted == "all"
            self._tokens += inputs["input_ids"].numel() if padded else inputs["attention_mask"].sum()

    def _add_up_tokens(self) -> None:
        """Before the state's number of tokens is read. Collective."""
        if self.args.include_num_input_tokens_seen != "no":
            own = torch.as_tensor(self._tokens, device=self.args.device, dtype=torch.int64)
            self.state.num_input_tokens_seen += int(self.accelerator.gather(own).sum())
            self._tokens = 0

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the learning rate of each group to what is logged."""
        self._add_up_tokens()
        if "loss" in logs:
            logs.update({f"lr_{name}": lr for name, lr in self._lrs.items()})
        super().log(logs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """The Trainer's; training goes on with the random numbers that it would have had without it."""
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            return super().evaluate(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what was trained (never the frozen model, which the Trainer would gather under DeepSpeed)."""
        state = gather_working_copies((n, p) for n, p in self.model.named_parameters() if p.requires_grad)
        if self.args.should_save:
            self._save(output_dir, state)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the run's model card, which has no scores yet, in place of the Trainer's (it calls this to upload)."""
        if self.is_world_process_zero():
            write_model_card(self._folder())

    def _folder(self, output_dir: str | None = None) -> Path:
        return Path(output_dir or self.config.training.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        assert state_dict is not None
        folder = self._folder(output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(self.model, folder, state_dict, self.config.model.model_name_or_path)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write the checkpoint aside, then publish it in one rename: a kill leaves it whole or not there.

        Raises:
            UserError: it could not be written (disk full, no permission); earlier checkpoints are untouched.
        """
        self._add_up_tokens()
        self._aside = True
        try:
            with saving(self._folder(), f"the checkpoint of step {self.state.global_step}"):
                super()._save_checkpoint(model, trial)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    publish_checkpoint(self._folder(), self.state.global_step, self.args.save_total_limit)
                self.accelerator.wait_for_everyone()
        finally:
            self._aside = False

    def _get_output_dir(self, trial: Any) -> str:
        root = super()._get_output_dir(trial)
        return str(Path(root) / SAVING) if self._aside else root

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with self._loading(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            load_connector(self.model, Path(resume_from_checkpoint))

    def _prepare_for_training(self, max_steps: Any, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """The Trainer's; at a resume it loads optimizer, scheduler and scaler, or all that DeepSpeed has saved."""
        with self._loading(resume_from_checkpoint):
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with self._loading(checkpoint):
            super()._load_rng_state(checkpoint)

    @contextmanager
    def _loading(self, checkpoint: str | None) -> Iterator[None]:
        """Around what loads from a checkpoint, if one is given.

        Raises:
            UserError: it cannot be loaded (whatever the reason: files of older versions are not hashed), or files of it
                vanished or changed meanwhile.
        """
        try:
            yield
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            if checkpoint is None:
                raise
            reason = next(iter(str(error).splitlines()), "")
            if not reason or "weights_only" in reason:  # PyTorch advises to run whatever code a file holds
                reason = "damaged"
            raise UserError(
                f"{checkpoint}: cannot be loaded ({reason}); delete the folder to continue from an earlier state"
            ) from error
        if checkpoint is not None and self.resuming is not None:
            self.resuming.check_unchanged()


class _StepFacts(TrainerCallback):
    """Notes what the Trainer does not: the epoch for our sampler, each group's learning rate as it was used."""

    def __init__(self, trainer: LLaVATrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # With several processes accelerate wraps the sampler so that its set_epoch is not reached.
        if self.trainer._sampler is not None:
            self.trainer._sampler.set_epoch(int(state.epoch or 0))

    def on_optimizer_step(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.trainer._lrs = {group["name"]: group["lr"] for group in kwargs["optimizer"].param_groups}


class _BackwardEndsAtTheConnector(TrainerCallback):
    """Keeps the frozen vision tower out of backward under activation checkpointing.

    Transformers makes the embeddings require a gradient then, the tower's too, although only the reentrant kind of
    checkpointing needs it: the tower would be recomputed and run backward for nothing.
    """

    def __init__(self, trainer: LLaVATrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        options: Any = args.activation_checkpointing_kwargs or {}
        if not options.get("use_reentrant", False):
            self.trainer.model.disable_input_require_grads()


class LLaVASculptTrainer(SculptMixin, LLaVATrainer):
    """LoRASculpt on LLaVA: masks for the LLM, the conflict regularizer in the loss."""
