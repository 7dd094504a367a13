"""Loading a checkpoint: seconds, and host memory of two processes that hold it at once, as two ranks on one machine.

An fp16 checkpoint with random weights (8 of the 7B's 32 layers, so that it takes 4 GB of disk for a moment) is asked
for in bf16, as llava-hf's is. Ours is what training and evaluation call; the baseline loads it into host memory and
moves it to the card. Private: memory that no other process shares (PSS), beyond that before loading.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaForConditionalGeneration

from gpu_parts.world import GIB, World, spread
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.load import load_base

TABLE, RANKS = "Loading", 2


def cases(world: World) -> Iterator[dict[str, Any]]:
    folder = world.folder / "fp16"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        base = world.checkpoint.path
        world.random_model(None if world.tiny else 8, torch.float16).save_pretrained(folder, max_shard_size="2GB")
        for name in ("tokenizer.model", "preprocessor_config.json"):
            shutil.copy(base / name, folder)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
        for case, ours in (("ours", True), ("through host memory", False)):
            found = side_by_side(world.processes, folder, ours)
            yield {
                "table": TABLE,
                "case": f"{case}, {RANKS} processes, {size / GIB:.1f} GiB each",
                "s": spread(seconds for seconds, _, _ in found),
                "GB/s": size / 1e9 / max(seconds for seconds, _, _ in found),
                "host GiB, all": sum(pss for _, pss, _ in found) / GIB,
                "most at once, GiB, all": sum(peak for _, _, peak in found) / GIB,
                "host / checkpoint": sum(pss for _, pss, _ in found) / size,
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def side_by_side(context: Any, folder: Path, ours: bool) -> list[tuple[float, int, int]]:
    """Seconds, PSS and peak RSS of each process while all hold the model."""
    barrier, ends, processes = context.Barrier(RANKS), [], []
    for _ in range(RANKS):
        receive, send = context.Pipe(duplex=False)
        processes.append(context.Process(target=load, args=(folder, ours, barrier, send)))
        processes[-1].start()
        send.close()
        ends.append(receive)
    try:
        return [end.recv() for end in ends]
    except EOFError:
        raise RuntimeError("a process that loads died") from None
    finally:
        for process in processes:
            process.join()


def load(folder: Path, ours: bool, barrier: Any, result: Connection) -> None:
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        torch.zeros(1, device=device)  # the context is not part of it
        before = memory()
        barrier.wait()
        start = time.perf_counter()
        if ours:
            model: Any = load_base(find_base_checkpoint(str(folder)), torch.bfloat16)
        else:
            model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, local_files_only=True)
        model = model.to(device)
        seconds = time.perf_counter() - start
        barrier.wait()
        result.send((seconds, *(now - then for now, then in zip(memory(), before, strict=True))))
        barrier.wait()
    except BaseException:
        barrier.abort()
        raise


def memory() -> tuple[int, int]:
    """Bytes of this process: its share of what is resident (PSS), and the most that was resident at once."""
    lines = [
        line.split()
        for file in ("smaps_rollup", "status")
        for line in Path("/proc/self", file).read_text().splitlines()
    ]
    found = {line[0]: int(line[1]) * 1024 for line in lines if line[0] in ("Pss:", "VmHWM:")}
    return found["Pss:"], found["VmHWM:"]
