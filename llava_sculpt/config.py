"""One run's configuration: typed fields with their defaults and help texts (`config_reader.py` reads them)."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments as HfTrainingArguments

from llava_sculpt.errors import UserError
from llava_sculpt.names import LORASCULPT, METHODS, PENALTIES, TRAINED
from llava_sculpt.ranges import out_of_range

CONNECTOR_MODES = ("full", "frozen", "lora", "sculpt")
_COUNT, _POSITIVE, _NOT_NEGATIVE, _SHARE, _SEED = "[1, inf)", "(0, inf)", "[0, inf)", "[0, 1)", "[0, 4294967295]"
# What the number fields below and Hugging Face's take. A field that is not here takes any that is finite.
RANGES = {
    "lora_r": _COUNT,
    "lora_alpha": _POSITIVE,
    "lora_dropout": _SHARE,
    "reg_lambda": METHODS[PENALTIES[0]].fields["reg_lambda"][1],
    "sculpt_density": "(0, 1]",
    "sculpt_warmup_steps": _POSITIVE,  # lora_B starts at zero and has no magnitudes
    "sculpt_omega": _POSITIVE,
    "sculpt_alpha": _NOT_NEGATIVE,
    "sculpt_beta": _NOT_NEGATIVE,
    "model_max_length": _COUNT,
    "learning_rate": _POSITIVE,
    "mm_projector_lr": _POSITIVE,
    "num_train_epochs": "(0, 1000000]",
    "max_steps": "-1 or [1, inf)",
    "warmup_steps": _NOT_NEGATIVE,
    "weight_decay": _NOT_NEGATIVE,
    "max_grad_norm": _NOT_NEGATIVE,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _NOT_NEGATIVE,
    "neftune_noise_alpha": _NOT_NEGATIVE,
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "torch_empty_cache_steps": _COUNT,
    "logging_steps": _POSITIVE,
    "save_steps": _POSITIVE,
    "eval_steps": _POSITIVE,
    "eval_delay": _NOT_NEGATIVE,
    "save_total_limit": _NOT_NEGATIVE,
    "seed": _SEED,
    "data_seed": _SEED,
    "dataloader_num_workers": "[0, 1000]",
    "dataloader_prefetch_factor": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "forgetting_probe": _NOT_NEGATIVE,
    "ddp_timeout": "[1, 1000000000]",
}


@dataclass
class ModelArguments:
    model_name_or_path: str = field(
        default="", metadata={"help": "Base model: a LLaVA-1.5 folder in Hugging Face layout, or its Hub id."}
    )
    version: str = field(default="v1", metadata={"help": "Conversation template of LLaVA.", "choices": ["v1"]})
    vision_tower: str | None = field(
        default=None, metadata={"help": "CLIP folder that replaces the tower in the checkpoint (default: keep it)."}
    )
    bits: int = field(
        default=16, metadata={"help": "Base weights: 16 (bf16/fp32), 8 or 4 (bitsandbytes).", "choices": [16, 8, 4]}
    )
    double_quant: bool = field(default=True, metadata={"help": "With --bits 4: quantise the scales too."})
    quant_type: str = field(default="nf4", metadata={"help": "With --bits 4: data type.", "choices": ["nf4", "fp4"]})
    lora_r: int = field(default=32, metadata={"help": "LoRA rank r."})
    lora_alpha: float | None = field(default=None, metadata={"help": "LoRA scale numerator (default: 2 r)."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout on the input of lora_A."})
    connector: str = field(
        default="full",
        metadata={
            "help": "Connector: full fine-tuning, frozen, LoRA, or LoRA with the L1 regularizer (sculpt).",
            "choices": list(CONNECTOR_MODES),
        },
    )


@dataclass
class DataArguments:
    data_path: str = field(default="", metadata={"help": "LLaVA training JSON."})
    image_folder: str = field(default="", metadata={"help": "Folder the records' `image` paths start from."})
    eval_data_path: str | None = field(
        default=None, metadata={"help": "LLaVA JSON of held-out samples: their loss is logged every --eval_strategy."}
    )
    eval_image_folder: str | None = field(
        default=None, metadata={"help": "Folder of the held-out samples' images (default: image_folder)."}
    )
    allow_outside: bool = field(
        default=False, metadata={"help": "Let `image` paths lead out of image_folder (absolute, or with ..)."}
    )
    image_aspect_ratio: str = field(default="pad", metadata={"help": "How images become square.", "choices": ["pad"]})


@dataclass
class SculptArguments:
    method: str = field(
        default="sculpt",
        metadata={
            "help": "LoRASculpt (sculpt), or a baseline.",
            "choices": list(TRAINED),
        },
    )
    reg_lambda: float = field(
        default=1e-3, metadata={"help": f"Weight of the penalty of method {' or '.join(PENALTIES)}."}
    )
    sculpt_density: float = field(
        default=0.1,
        metadata={
            "help": "Fraction of entries kept in each lora_A and lora_B (the paper's s); 1 never prunes (RKH only)."
        },
    )
    sculpt_warmup_steps: float = field(
        default=100.0,
        metadata={"help": "Optimizer steps before the masks are made; below 1 a fraction of training."},
    )
    sculpt_omega: float = field(default=1.0, metadata={"help": "Steepness of the retention mask (Eq. 7)."})
    sculpt_alpha: float = field(default=1e-3, metadata={"help": "Weight of the LLM's regularizer (Eq. 9)."})
    sculpt_beta: float = field(default=1e-5, metadata={"help": "Weight of the connector's regularizer (Eq. 11)."})
    sculpt_reduction: str = field(
        default="mean",
        metadata={"help": "Regularizer over matrices: mean (release) or sum (paper).", "choices": ["mean", "sum"]},
    )

    def problems(self) -> list[str]:
        """Impossible values, one message each."""
        problems = []
        try:
            self.to_config()
        except UserError as error:
            problems += [f"sculpt_{problem}" for problem in error.problems]
        if wrong := out_of_range(self.reg_lambda, float, RANGES["reg_lambda"]):
            problems.append(f"reg_lambda: {wrong}")
        return problems

    def to_config(self, **layers: Any) -> SculptConfig:
        """The method's settings, for a model whose layers the patterns name (see `SculptConfig`).

        Raises:
            UserError: impossible values, all at once.
        """
        prefix = "sculpt_"
        given = {f.name: getattr(self, f.name) for f in dataclasses.fields(SculptArguments)}
        own: Any = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
        return SculptConfig(**own, **layers)


@dataclass(frozen=True)
class SculptConfig:
    """LoRASculpt on any PEFT model: how strongly, and on which of its LoRA layers.

    The patterns are regular expressions for whole module names in the base model, read as PEFT reads a
    `target_modules` string.

    Attributes:
        density: fraction of entries kept in each pruned lora_A and lora_B (the paper's s).
        warmup_steps: optimizer steps before the masks are made; below 1 a fraction of training.
        omega: steepness of the retention mask (Eq. 7).
        alpha: weight of the Frobenius term (Eq. 9), over the layers that `regularize` names.
        beta: weight of the L1 term (Eq. 11), over the layers that `connector` names.
        reduction: mean (as released) or sum (as in the paper) over the matrices of a term.
        prune: layers that get masks.
        regularize: layers of Eq. 8; the paper's are the query, key and value projections of the language model.
        connector: layers of Eq. 10; None leaves the term out.

    Raises:
        UserError: impossible values, all at once.
    """

    density: float = 0.1
    warmup_steps: float = 100.0
    omega: float = 1.0
    alpha: float = 1e-3
    beta: float = 1e-5
    reduction: str = "mean"
    prune: str = r".*"
    regularize: str = r".*\.(q_proj|k_proj|v_proj)"
    connector: str | None = None

    def __post_init__(self) -> None:
        problems = [
            f"{name}: {wrong}"
            for name in ("density", "warmup_steps", "omega", "alpha", "beta")
            if (wrong := out_of_range(getattr(self, name), float, RANGES[f"sculpt_{name}"]))
        ]
        if not problems and self.warmup_steps > 1 and self.warmup_steps % 1:
            problems.append(f"warmup_steps: whole steps, or a fraction below 1; got {self.warmup_steps}")
        if self.reduction not in ("mean", "sum"):
            problems.append(f"reduction: must be mean or sum, got {self.reduction!r}")
        for name in ("prune", "regularize", "connector"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                problems.append(f"{name}: {getattr(self, name)!r} is not a regular expression ({error})")
        if problems:
            raise UserError(problems)


@dataclass
class TrainingArguments(HfTrainingArguments):
    """Hugging Face's training arguments with LLaVA's additions and this recipe's defaults."""

    output_dir: str = field(default="", metadata={"help": "Folder of this run."})
    model_max_length: int = field(
        default=2048, metadata={"help": "Tokens per sample after the image is expanded; longer ones are cut."}
    )
    mm_projector_lr: float | None = field(
        default=2e-5, metadata={"help": "Learning rate of the connector when it is fully fine-tuned."}
    )
    group_by_modality_length: bool = field(
        default=True, metadata={"help": "Batches of one modality and similar length."}
    )
    learning_rate: float = field(default=2e-4, metadata={"help": "Learning rate of LoRA."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the training data."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=0.03, metadata={"help": "Learning rate warm-up: steps, or a fraction of training below 1."}
    )
    optim: str = field(default="adamw_torch", metadata={"help": "Optimizer."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient clipping (also under DeepSpeed)."})
    logging_steps: float = field(default=10, metadata={"help": "Log every so many optimizer steps."})
    save_total_limit: int | None = field(default=1, metadata={"help": "Checkpoints kept (0: all)."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "The collator needs every field."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log 0 in place of a loss that is not finite (training stops there anyway)."}
    )
    include_num_input_tokens_seen: str = field(
        default="all", metadata={"help": "Count tokens for tokens/s.", "choices": ["all", "non_padding", "no"]}
    )

    forgetting_probe: int = field(
        default=0,
        metadata={"help": "Training pictures on which forgetting is measured; 0: not at all."},
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "With --push_to_hub: upload the finished run.", "choices": ["end"]}
    )
    ignore_plan: bool = field(
        default=False, metadata={"help": "Start although `llava-sculpt plan` says that the GPU's memory is too small."}
    )

    plan: str = field(
        default="given",
        metadata={
            "help": "How a step is split and checkpointed: as given, or the fastest way that fits the GPU, with the "
            "same global batch (`llava-sculpt plan` names it).",
            "choices": ["given", "auto"],
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.cuda.is_available()
        # From pinned memory a batch is sent while the step before it still runs.
        accelerator: Any = self.accelerator_config  # an AcceleratorConfig by now
        accelerator.non_blocking = self.dataloader_pin_memory


@dataclass
class Config:
    """Everything one training run depends on."""

    model: ModelArguments
    data: DataArguments
    sculpt: SculptArguments
    training: TrainingArguments

    @property
    def lora_alpha(self) -> float:
        """lora_alpha, by default 2 r (the release's choice)."""
        return 2.0 * self.model.lora_r if self.model.lora_alpha is None else self.model.lora_alpha

    @property
    def prunes(self) -> bool:
        """Whether masks are made: LoRASculpt, unless every entry is kept."""
        return self.sculpt.method == LORASCULPT and self.sculpt.sculpt_density < 1

    def optimizer_steps(self, samples: int, processes: int) -> int:
        """Optimizer steps of the whole run, by the Trainer's own rule (partial batches and partial steps count)."""
        if self.training.max_steps > 0:
            return self.training.max_steps
        batches = math.ceil(math.ceil(samples / processes) / self.training.per_device_train_batch_size)
        per_epoch = math.ceil(batches / self.training.gradient_accumulation_steps)
        return math.ceil(self.training.num_train_epochs * per_epoch)

    def to_dict(self) -> dict[str, Any]:
        """Flat, JSON-serialisable record of every field (run.json, model card)."""
        flat: dict[str, Any] = {}
        for part in (self.model, self.data, self.sculpt):
            flat.update(dataclasses.asdict(part))
        flat["lora_alpha"] = self.lora_alpha
        return {**self.training.to_dict(), **flat}

    def identity(self) -> dict[str, Any]:
        """The fields that decide the result: two runs that agree in them may continue each other."""
        unused = set() if self.sculpt.method in PENALTIES else {"reg_lambda"}
        counts = {k: v for k, v in self.to_dict().items() if k not in _DOES_NOT_CHANGE_THE_RESULT | unused}
        options: Any = counts.get("activation_checkpointing_kwargs") or {}
        kept = {k: v for k, v in options.items() if k != "every_n_layers"}
        return {**counts, "activation_checkpointing_kwargs": kept or None}


# Where a run is written, how it is watched and split over devices: free to change between a start and its resume.
# (Paths too: the identity of a run holds the hashes of base and data instead.)
_DOES_NOT_CHANGE_THE_RESULT = frozenset(
    """
    output_dir logging_dir run_name report_to logging_steps logging_strategy logging_first_step logging_nan_inf_filter
    save_steps save_strategy save_total_limit disable_tqdm log_level log_level_replica log_on_each_node project
    trackio_space_id trackio_bucket_id trackio_static_space_id local_rank ddp_timeout ddp_backend
    dataloader_num_workers dataloader_prefetch_factor dataloader_pin_memory dataloader_persistent_workers
    accelerator_config push_to_hub hub_model_id hub_token hub_strategy hub_private_repo hub_revision hub_always_push
    per_device_train_batch_size gradient_accumulation_steps activation_checkpointing gradient_checkpointing
    include_num_input_tokens_seen use_cpu ignore_plan plan deepspeed model_name_or_path data_path image_folder
    eval_data_path eval_image_folder allow_outside eval_strategy eval_steps eval_delay eval_on_start do_eval
    per_device_eval_batch_size eval_accumulation_steps forgetting_probe
    """.split()
)
