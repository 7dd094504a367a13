"""Loading a checkpoint: seconds, and host memory of two processes that load it at once, as ranks on one machine.

An fp16 checkpoint with random weights (8 of the 7B's 32 layers, 4 GB of disk for a moment) is asked for in bf16, as
llava-hf's is. Memory is PSS (a shared page counts in parts) of both together, in copies of the weight files: private
and shared at the peak, and what is left. Aim: one copy at most. Baseline: loading to the host, as before.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import torch
from loading import measure

from gpu_parts.world import World, forget

RANKS = 2
CASES = {"to the host": "host", "streamed to the GPU": "streamed"}


def cases(world: World) -> Iterator[dict[str, Any]]:
    folder = world.folder / "fp16"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        world.random_model(None if world.tiny else 8, torch.float16).save_pretrained(folder, max_shard_size="2GB")
        forget(world.device)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        for name, case in CASES.items():
            found = measure(folder, case, torch.bfloat16, RANKS, "fork" if world.tiny else "spawn")
            yield {
                "table": f"{RANKS} processes, a checkpoint of {size / 1e9:.1f} GB",
                "case": name,
                "s": found["seconds"],
                "GB/s each": size / 1e9 / found["seconds"],
                "copies at the peak": found["peak"],
                "private": found["private"],
                "shared": found["shared"],
                "left": found["left"],
                "on the GPU": found["on_gpu"],
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)
