"""LLaVA's TrainingArguments with the method's fields, checked before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.train import train as llava_train
from transformers import set_seed

from llava_sculpt.config import SculptArguments
from llava_sculpt.errors import UserError
from llava_sculpt.names import LORA, LORASCULPT


@dataclass
class TrainingArguments(SculptArguments, llava_train.TrainingArguments):
    """All of LLaVA's training flags, `--method` and `--sculpt_*`. `deepspeed` becomes the content of its file.

    Raises:
        UserError: settings that this front end cannot honour, all at once.
    """

    def __post_init__(self: Any) -> None:
        problems = self.problems()
        if self.method not in (LORASCULPT, LORA):
            problems.append(f"method: {self.method} runs in the main front end only (llava-sculpt train)")
        if not self.lora_enable:
            problems.append("lora_enable: must be True: the method works on LoRA")
        if self.lora_bias != "none":
            problems.append(f"lora_bias: must be none, got {self.lora_bias}")
        if self.deepspeed and self.use_cpu:
            problems.append("use_cpu: leave it out with --deepspeed (DeepSpeed would silently become DDP)")
        if self.deepspeed:
            self.deepspeed = _read_zero2(self.deepspeed, problems)
        if problems:
            raise UserError(problems)
        if self.gradient_checkpointing and self.gradient_checkpointing_kwargs is None:
            self.gradient_checkpointing_kwargs = {"use_reentrant": False}
        super().__post_init__()
        # Before LoRA's random start: the original seeds after it, and no run can be repeated.
        set_seed(self.seed)


def _read_zero2(path: str, problems: list[str]) -> dict[str, Any] | None:
    """A DeepSpeed configuration with gradient clipping said: engines differ in what they do when it is not."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"deepspeed: {path}: not readable as JSON: {error}")
        return None
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage != 2:
        problems.append(f"deepspeed: {path}: zero_optimization.stage must be 2 here, got {stage}")
    return {"gradient_clipping": "auto", **config}
