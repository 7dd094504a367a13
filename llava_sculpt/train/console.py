"""What a person sees while training runs: a bar on a terminal, one line per log, and what the run came to."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from llava_sculpt.config import Config
from llava_sculpt.names import METHODS, PENALTIES
from llava_sculpt.progress import ProgressBar

_LINES = ("loss", "eval_loss", "forgetting_kl")  # what is logged apart, a line each


def say(line: str) -> None:
    """Print a line above any progress bar, at once also into a file."""
    tqdm.write(line)
    sys.stdout.flush()


class TrainingBar(TrainerCallback):
    """A context around training: on a terminal a bar with what was logged last, below it one for held-out samples."""

    def __init__(self, trainer: Trainer, shown: bool) -> None:
        self._shown = shown
        self._bars: list[ProgressBar] = []
        trainer.add_callback(self)

    def __enter__(self) -> TrainingBar:
        return self

    def __exit__(self, *error: object) -> None:
        while self._bars:
            self._bars.pop().__exit__()

    def _add(self, title: str, total: int, done: int, keep: bool) -> None:
        self._bars.append(ProgressBar(title, total, done, keep=keep, shown=self._shown).__enter__())

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._add("training", state.max_steps, state.global_step, True)

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bars[0].to(state.global_step)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if logs is not None and "loss" in logs:
            shown = ("loss", "lr_lora", "train_tokens_per_second")
            self._bars[0].facts = list(_facts({key: value for key, value in logs.items() if key in shown}).values())

    def on_prediction_step(
        self, args: Any, state: TrainerState, control: TrainerControl, eval_dataloader: Any = None, **kwargs: Any
    ) -> None:
        if len(self._bars) == 1:
            self._add("held-out samples", len(eval_dataloader), 0, False)
        self._bars[1].step()

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        while len(self._bars) > 1:
            self._bars.pop().__exit__()


class LogLines(TrainerCallback):
    """One line per log of training, evaluation or the forgetting probe, in place of printed dictionaries."""

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        if state.is_world_process_zero and logs is not None and any(key in logs for key in _LINES):
            say(log_line(state.global_step, state.max_steps, logs))


def log_line(step: int, steps: int, logs: dict[str, Any]) -> str:
    """One log entry as a line of at most 100 columns; what was not logged is left out.

    `120/375  loss 1.234  task 1.233  CMR 1.2e-3  lr 2.0e-4/2.0e-5  kept 10%  grad 0.51  5012 tok/s`: after a slash
    the connector's. CMR without a slash is the LLM's; `kept` is the density of the pruned matrices.
    """
    return "  ".join([f"{step:>{len(str(steps))}}/{steps}", *_facts(logs).values()])


def _facts(logs: dict[str, Any]) -> dict[str, str]:
    """What was logged, as in `log_line`, by label."""
    facts = {}
    for label, keys, style in (
        ("loss", ("loss",), ".3f"),
        ("held-out loss", ("eval_loss",), ".4f"),
        ("forgetting KL", ("forgetting_kl",), ".4f"),
        ("answers changed", ("forgetting_changed",), ".0%"),
        ("task", ("task_loss",), ".3f"),
        ("CMR", ("cmr_llm", "cmr_connector"), ".1e"),
        *((METHODS[name].label, (f"{name}_penalty",), ".1e") for name in PENALTIES),
        ("lr", ("lr_lora", "lr_connector"), ".1e"),
        ("kept", ("density",), ".0%"),
        ("grad", ("grad_norm",), ".3g"),
        ("tok/s", ("train_tokens_per_second",), ".0f"),
    ):
        # 1.2e-3, not 1.2e-03
        values = [f"{logs[key]:{style}}".replace("e-0", "e-").replace("e+0", "e+") for key in keys if key in logs]
        if values:
            facts[label] = f"{label} {'/'.join(values)}"
    return facts


def closing_block(config: Config, record: dict[str, Any], losses: list[float]) -> str:
    """What a finished run came to, and the commands that come next.

    Args:
        record: run.json.
        losses: what was logged as loss, first to last.
    """
    folder, method = Path(config.training.output_dir), METHODS[config.sculpt.method].label
    seconds, steps = round(record["train_seconds"]), record["steps"]
    trend = f", loss {losses[0]:.3f} -> {losses[-1]:.3f}" if losses else ""
    own, merged = shlex.quote(str(folder)), shlex.quote(f"{folder}_merged")
    after = f"inspect {own}" if config.prunes else f"merge {own} --out {merged}"
    return "\n".join(
        [
            f"trained  {method}, rank {config.model.lora_r}, on {config.data.data_path} "
            f"({record['data']['samples']:,} samples): {steps:,} steps{trend}",
            f"in       {folder}",
            f"took     {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}, "
            f"peak memory {record['peak_memory_bytes'] / 2**30:.2f} GiB",
            f"next     llava-sculpt eval --model {own} --tasks all",
            f"         llava-sculpt {after}",
        ]
    )
