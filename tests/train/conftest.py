from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from llava_sculpt.train.train import main

Train = Callable[..., int]


@pytest.fixture(scope="session")
def flags(checkpoint: Path, training_data: Path) -> dict[str, str]:
    """A run of 18 optimizer steps (6 an epoch, batch 4) whose masks are made before step 5."""
    return {
        "model_name_or_path": str(checkpoint),
        "data_path": str(training_data / "train.json"),
        "image_folder": str(training_data / "images"),
        "lora_r": "8",
        "per_device_train_batch_size": "4",
        "learning_rate": "5e-3",
        "mm_projector_lr": "1e-3",
        "sculpt_alpha": "0.1",
        "sculpt_warmup_steps": "5",
        "logging_steps": "1",
        "save_steps": "100",
        "disable_tqdm": "True",
    }


@pytest.fixture(scope="session")
def train(flags: dict[str, str]) -> Train:
    """`train(output_dir, lora_r=4, ...)` runs the training entry point in this process and returns its exit code."""

    def run(output_dir: Path, **overrides: object) -> int:
        given = {**flags, "output_dir": str(output_dir), **{k: str(v) for k, v in overrides.items()}}
        return main([word for key, value in given.items() for word in (f"--{key}", value)])

    return run
