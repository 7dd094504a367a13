"""A training step of the whole model on one card, by the trainer of the recipe: LoRA, LoRASculpt, and LoRASculpt with
the regularizer as the paper's release has it.

4 x 700 tokens, 576 of them image, random weights, plain PyTorch in bf16. The methods take turns: each trains a few
steps, twice. A setting that `plan` says does not fit is not tried. TFLOP/s count what is recomputed; share of peak: of
what a product of two square matrices reaches here. Aim: LoRASculpt takes at most 1.02 times LoRA's step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from cmr import released_penalty

from gpu_parts.card import asked
from gpu_parts.world import GIB, StepClock, World, forget, matmul_flops, peak_gib, spread
from llava_sculpt.config import Config
from llava_sculpt.data.dataset import LlavaDataset
from llava_sculpt.memory.parts import OUTSIDE_BYTES
from llava_sculpt.memory.plan import GB, Plan, fastest, make_plan, use
from llava_sculpt.model.lora import LoraPair
from llava_sculpt.train import train as training
from llava_sculpt.train.regularizer import Regularizer

LORA, SCULPT, RELEASED = "LoRA", "LoRASculpt", "LoRASculpt, release's CMR"
METHODS = {LORA: "lora", SCULPT: "sculpt", RELEASED: "sculpt"}
TABLE = "One training step"
FASTEST = "16 samples, plan's fastest"
# What of the recipe is changed, by name; from the second on each is tried once, with LoRA and LoRASculpt.
SETTINGS: dict[str, dict[str, str]] = {
    "as the recipe": {},
    "every 2nd layer checkpointed": {"activation_checkpointing_kwargs": '{"every_n_layers": 2}'},
    "no checkpointing": {"activation_checkpointing": "false"},
    "no checkpointing, batch 8": {"activation_checkpointing": "false", "per_device_train_batch_size": "8"},
    FASTEST: {"gradient_accumulation_steps": "4", "plan": "auto"},
    # The last: Liger's kernels stay in the model.
    "Liger": {"use_liger_kernel": "true", "liger_kernel_config": '{"fused_linear_cross_entropy": false}'},
}


class ReleasedCMR(Regularizer):
    """The release's formulation in this trainer: M and B A of every matrix kept by autograd, after the forward pass."""

    before_forward = False

    def __init__(self, pairs: list[LoraPair], strength: float) -> None:
        super().__init__({})
        self.pairs, self.strength, self.last = pairs, strength, torch.zeros(())

    def __call__(self) -> torch.Tensor:
        values = [released_penalty(pair.lora_A, pair.lora_B, pair.weight()) for pair in self.pairs]
        total = self.strength * torch.stack(values).mean()
        self.last = total.detach()
        return total - self.last

    def value(self) -> torch.Tensor:
        return self.last


@dataclass
class Measured:
    """What the trainings of one method in one setting took."""

    plan: Plan
    seconds: list[float] = field(default_factory=list)
    rounds: list[float] = field(default_factory=list)
    peak: float | None = None


def cases(world: World) -> Iterator[dict[str, Any]]:
    started, longest = time.monotonic(), 0.0
    peak = spread(matmul_flops(world.device, world.dtype))
    assert peak is not None
    yield {"table": TABLE, "case": "product of two square matrices", "TFLOP/s": spread([peak["median"]], 1e-12)}
    base = world.random_model()
    for setting, flags in SETTINGS.items():
        begun = time.monotonic()
        reason = why_not(world, setting, flags)
        if reason is None and begun - started + 1.5 * longest > world.limit:
            reason = "no time left"
        if reason is not None:
            yield {"table": TABLE, "case": setting, "error": f"not run: {reason}"}
            continue
        first = not longest
        found: dict[str, Measured] = {}
        for _ in range(2 if first else 1):
            for method in METHODS if first else (SCULPT,) if world.tiny else (LORA, SCULPT):
                case, problem = f"{setting}: {method}", None
                try:
                    train(world, base, method, flags, found)
                except torch.OutOfMemoryError as error:
                    problem = str(error).split(". ")[0]
                if problem is None:
                    yield row(case, found[method], peak["median"])
                else:  # here, where the error no longer holds what was on the card
                    clean(base, world)
                    yield {"table": TABLE, "case": case, "error": problem}
        for method in (SCULPT, RELEASED):
            if LORA in found and method in found:
                pairs = zip(found[method].rounds, found[LORA].rounds, strict=False)
                ratio = spread(mine / plain for mine, plain in pairs)
                yield {"table": "Beside LoRA's step", "case": f"{setting}: {method}", "x LoRA": ratio}
        longest = max(longest, (time.monotonic() - begun) / (3 if first else 1))  # six trainings, then two
    for name, value in asked().items() if world.device.type == "cuda" else ():
        yield {"table": "The card right after it", "case": name, "value": value}


def why_not(world: World, setting: str, flags: dict[str, str]) -> str | None:
    """Why a setting is not tried here, if it is not."""
    if setting == "Liger" and find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    if world.device.type == "cpu":
        return None
    needed, there = configured(world, SCULPT, flags)[2].total, torch.cuda.get_device_properties(0).total_memory
    return f"plan counts {needed / GIB:.1f} GiB of {there / GIB:.1f}" if needed > there else None


def configured(world: World, method: str, flags: dict[str, str]) -> tuple[Config, LlavaDataset, Plan]:
    """A training of one method in one setting, and what `plan` says of it."""
    config, dataset = world.config(METHODS[method], **flags), world.dataset()
    plan = make_plan(config, world.checkpoint.config, 1, None, len(dataset), dataset.modality_lengths)
    if config.training.plan == "auto" and (best := fastest(plan, training.gpu_memory() or 24 * GB)) is not None:
        use(best, config.training)
        plan = best
    return config, dataset, plan


def train(world: World, base: Any, method: str, flags: dict[str, str], found: dict[str, Measured]) -> None:
    """A few steps of one method; `base` is as before afterwards."""
    config, dataset, plan = configured(world, method, flags)
    clock = StepClock(world.device)
    forget(world.device)
    with patch.object(training, "load_base", lambda *_, **__: base):
        trainer = training.build_trainer(config, world.checkpoint, dataset)
    if method == RELEASED:
        trainer.regularizer = ReleasedCMR(trainer.regularizer.llm, config.sculpt.sculpt_alpha)
    trainer.add_callback(clock)
    trainer.train()
    measured = found.setdefault(method, Measured(plan))
    measured.peak = peak_gib(world.device)
    measured.seconds += clock.seconds
    measured.rounds.append(spread(clock.seconds)["median"])
    del trainer
    clean(base, world)


def clean(base: Any, world: World) -> None:
    """Take LoRA and the trainer's settings off the base model."""
    for module in list(base.modules()):
        for name, child in list(module.named_children()):
            if hasattr(child, "get_base_layer"):
                setattr(module, name, child.get_base_layer())
    base.gradient_checkpointing_disable()
    base.to(world.dtype).requires_grad_(False)
    for parameter in base.parameters():
        parameter.grad = None
    forget(world.device)


def row(case: str, measured: Measured, peak: float) -> dict[str, Any]:
    plan, seconds = measured.plan, spread(measured.seconds)
    assert seconds is not None
    flops = plan.flops / plan.steps / seconds["median"]
    in_use = {"GiB in use": measured.peak, "GiB by plan": (plan.total - OUTSIDE_BYTES) / GIB} if measured.peak else {}
    return {
        "table": TABLE,
        "case": case,
        "s": seconds,
        "tokens/s": plan.tokens_per_step / seconds["median"],
        "TFLOP/s": flops / 1e12,
        "share of peak": flops / peak,
        **({"setting": plan.setting()} if case.startswith(FASTEST) else {}),
        **in_use,
    }
