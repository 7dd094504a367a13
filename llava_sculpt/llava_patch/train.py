"""LLaVA's own training with LoRASculpt, inside an environment of the original llava package:

    python -m llava_sculpt.llava_patch.train --lora_enable True --model_name_or_path liuhaotian/llava-v1.5-7b ...
    torchrun --nproc_per_node 4 -m llava_sculpt.llava_patch.train ...
    deepspeed --num_gpus 4 --module llava_sculpt.llava_patch.train --deepspeed configs/zero2.json ...

All flags of LLaVA's train.py, plus --method and --sculpt_*. Its train() runs as it is; replaced are its
TrainingArguments, its LLaVATrainer and two helpers. docs/interop.md has the versions.
"""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Any

import torch

from llava_sculpt.errors import UserError
from llava_sculpt.train.zero import leave_together, start_gloo


def main() -> int:
    """Run LLaVA's train() on sys.argv; returns the exit code (0 done, 2 bad input)."""
    try:
        if find_spec("llava") is None:
            raise UserError("the original llava package is not installed here (docs/interop.md says how)")
        _start_processes(sys.argv)
        _patch()
        from llava.train import train as original

        original.train()
        leave_together()
    except UserError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return 2
    return 0


def _patch() -> None:
    """Replace the module globals that LLaVA's train() reads."""
    from llava.train import train as original
    from transformers import trainer as transformers_trainer

    from llava_sculpt.llava_patch.arguments import TrainingArguments
    from llava_sculpt.llava_patch.trainer import load_engine_checkpoint, make_trainer

    module: Any = original
    trainer_module: Any = transformers_trainer
    module.TrainingArguments = TrainingArguments
    module.LLaVATrainer = make_trainer
    # The original's imports DeepSpeed, also where nothing else needs it, at the end of the training.
    module.maybe_zero_3 = lambda parameter, **_: parameter.detach().cpu().clone()
    trainer_module.deepspeed_load_checkpoint = load_engine_checkpoint


def _start_processes(argv: list[str]) -> None:
    """What has to happen before arguments are parsed.

    Left alone where there is no GPU, accelerate finds no backend for several processes, or replaces DeepSpeed by DDP
    in silence.
    """
    words = [word.partition("=")[0] for word in argv]
    if "--forgetting_probe" in words:
        raise UserError("forgetting_probe: works in the main front end only (llava-sculpt train); leave it out here")
    if "--deepspeed" in words and "LOCAL_RANK" not in os.environ:
        raise UserError("deepspeed: start it with the deepspeed launcher or torchrun, also for one process")
    if torch.cuda.is_available():
        return
    if "--deepspeed" in words:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        start_gloo()
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1 and "--use_cpu" not in words:
        argv += ["--use_cpu", "True"]


if __name__ == "__main__":
    sys.exit(main())
