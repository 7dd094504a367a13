"""Plain LoRA by others on the same model, card and batch: same targets, rank, checkpointing, samples and collator.

None of them has masks or CMR. LLaMA-Factory and Unsloth take a checkpoint by its name and want versions of their own
of the libraries, so that they are not run in this environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from gpu_parts.world import StepClock, World, forget, peak_gib, spread
from llava_sculpt.data.collator import TrainCollator
from llava_sculpt.model.lora import LLM_TARGETS

TABLE = "Plain LoRA by others"


def cases(world: World) -> Iterator[dict[str, Any]]:
    # Liger's kernels stay in the model: each takes a new one, which costs a second.
    yield from measured(world, "transformers Trainer + PEFT", {})
    if find_spec("trl") is None:
        yield {"table": TABLE, "case": "TRL SFTTrainer + PEFT", "error": "not run: trl is not installed"}
    else:
        yield from measured(world, "TRL SFTTrainer + PEFT", {}, trl=True)
    if find_spec("liger_kernel") is None:
        yield {"table": TABLE, "case": "Trainer + PEFT + Liger", "error": "not run: liger-kernel is not installed"}
    else:
        # Its fused cross-entropy slices LLaVA's hidden states in a way that padding masks break.
        liger = {"use_liger_kernel": True, "liger_kernel_config": {"fused_linear_cross_entropy": False}}
        yield from measured(world, "Trainer + PEFT + Liger", liger)
    for name in ("LLaMA-Factory", "Unsloth"):
        yield {"table": TABLE, "case": name, "error": "not run: needs an environment and a checkpoint of its own"}


def measured(world: World, name: str, more: dict[str, Any], trl: bool = False) -> Iterator[dict[str, Any]]:
    """One trainer's steps; what it raises is its row's error."""
    try:
        yield {"table": TABLE, "case": name, **train(world, more, trl)}
    except Exception as error:
        yield {"table": TABLE, "case": name, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    forget(world.device)


def train(world: World, more: dict[str, Any], trl: bool) -> dict[str, Any]:
    recipe, checkpoint = world.config("lora"), world.checkpoint
    r, batch = recipe.model.lora_r, recipe.training.per_device_train_batch_size
    forget(world.device)
    lora = LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=recipe.model.lora_dropout, target_modules=LLM_TARGETS)
    model = get_peft_model(world.random_model(), lora)
    options: dict[str, Any] = {
        "output_dir": str(world.folder / "peer"),
        "max_steps": world.steps,
        "per_device_train_batch_size": batch,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": recipe.training.bf16,
        "tf32": recipe.training.tf32,
        "use_cpu": world.device.type == "cpu",
        "save_strategy": "no",
        "report_to": "none",
        "remove_unused_columns": False,
        "dataloader_num_workers": recipe.training.dataloader_num_workers,
        "disable_tqdm": True,
        **more,
    }
    collator = TrainCollator(
        checkpoint.pad_token_id,
        checkpoint.image_token_id,
        checkpoint.image_tokens,
        checkpoint.image_size,
        world.tokens,
    )
    if trl:
        from trl import SFTConfig, SFTTrainer

        arguments = SFTConfig(**options, dataset_kwargs={"skip_prepare_dataset": True}, max_length=None)
        trainer: Any = SFTTrainer(model, arguments, collator, world.dataset())
    else:
        trainer = Trainer(model, TrainingArguments(**options), collator, world.dataset())
    clock = StepClock(world.device)
    trainer.add_callback(clock)
    trainer.train()
    seconds = spread(clock.seconds)
    assert seconds is not None
    in_use = {"GiB in use": peak_gib(world.device)} if world.device.type == "cuda" else {}
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "s": seconds,
        "tokens/s": batch * world.tokens / seconds["median"],
        **in_use,
        "trained, million": trained / 1e6,
    }
