"""What a person sees while training runs: a progress bar, and one line per log."""

from __future__ import annotations

from typing import Any

from transformers import ProgressCallback, TrainerControl, TrainerState
from transformers import TrainingArguments as HfTrainingArguments

from llava_sculpt.names import METHODS, PENALTIES


class ConsoleCallback(ProgressCallback):
    """Hugging Face's progress bar with readable log lines in place of printed dictionaries."""

    def on_log(
        self,
        args: HfTrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if self.training_bar is not None and logs is not None and "loss" in logs:
            self.training_bar.write(log_line(state.global_step, state.max_steps, logs))


def log_line(step: int, steps: int, logs: dict[str, Any]) -> str:
    """One log entry as a line: `step 120/375  loss 1.2340  ...`; quantities that were not logged are left out."""
    width = len(str(steps))
    parts = [f"step {step:>{width}}/{steps}", f"loss {logs['loss']:.4f}"]
    for key, label, style in (
        ("task_loss", "task", ".4f"),
        ("cmr_llm", "CMR llm", ".3e"),
        ("cmr_connector", "CMR connector", ".3e"),
        *((f"{name}_penalty", METHODS[name].label, ".3e") for name in PENALTIES),
        ("lr_lora", "lr lora", ".1e"),
        ("lr_connector", "lr connector", ".1e"),
        ("density", "density", ".3f"),
        ("grad_norm", "|grad|", ".2f"),
        ("train_tokens_per_second", "tokens/s", ",.0f"),
    ):
        if key in logs:
            parts.append(f"{label} {logs[key]:{style}}")
    return "  ".join(parts)
