"""Result files made up from a seed, in the layout of real ones, for tests of the report."""

from __future__ import annotations

import random
from typing import Any

from llava_sculpt.experiments.grid import Run

TASKS = ("okvqa", "ocrvqa", "gqa", "textvqa")
MODULES = {"self_attn.q_proj": (160, 160), "self_attn.v_proj": (160, 160), "mlp.down_proj": (160, 432)}


def made_up_result(run: Run) -> dict[str, Any]:
    """A result in which LoRA forgets with rank and epochs, LoRASculpt little, and everything else lies between."""
    rank, epochs = run.setting("lora_r") or 0, run.setting("num_train_epochs") or 3
    # Not from the name, which depends on the values that configs/ has today.
    rng = random.Random(f"{run.task} {run.method} {run.seed} {rank} {epochs} {run.setting('connector')}")
    loss = {"zero_shot": 0.0, "sculpt": 0.5}.get(run.method, 1.0) * (rank / 4 + 3 * epochs)
    if run.setting("connector") == "frozen":
        loss /= 2
    source = {task: max(0.0, 97 - loss + rng.gauss(0, 0.7)) for task in TASKS}
    target = {"iconqa": 32.0, "coco": 40.0} if run.method == "zero_shot" else {run.task: 55 + rng.gauss(0, 0.2)}
    scores = {**source, **target}
    mean = sum(source.values()) / 4
    content: dict[str, Any] = {
        "run": {**run.identity, "parent": run.parent.adapter_name if run.parent else None},
        "scores": {t: {"source": mean, "target": v, "avg": (mean + v) / 2} for t, v in target.items()},
        "tasks": {name: {"score": v, "n": 300, "metric": "accuracy", "variant": "exact"} for name, v in scores.items()},
        "base": "b" * 64,
        "data": {name: name * 8 for name in scores},
        "record": {"seconds": {"train": 40.0 * epochs, "evaluate": 9.0}, "versions": {"torch": "2.13.0"}},
    }
    if run.method in ("lora", "sculpt"):
        steps = list(range(25, 400, 25))
        curve = {"step": steps, "task_loss": [2.5 * step**-0.3 + rng.gauss(0, 0.01) for step in steps]}
        if run.method == "sculpt":
            curve["cmr_llm"] = [0.01 + 0.002 * step**0.5 for step in steps]
        content["curve"] = curve
    if run.method == "sculpt":
        found = {
            f"model.language_model.layers.{layer}.{name}": [0.1, 0.1, 0.25 - 0.01 * layer + rng.gauss(0, 0.005), 0.275]
            for layer in range(4)
            for name in MODULES
        }
        parts = ["density_A", "density_B", "density_BA", "expected_BA"]
        content["densities"] = {"parts": parts, "total": [0.1, 0.1, 0.24, 0.275], "modules": found}
    return content
