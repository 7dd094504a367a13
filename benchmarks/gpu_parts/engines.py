"""Several GPUs: equality with one, ZeRO-2 and ZeRO-3 at the real size, and scaling from one GPU to all.

Equality: the tiny model in float32, one process against all, with the same global batch. The 7B is read from a
checkpoint with random weights, which takes 14 GB of disk (with less, fewer layers). Batch 4 per GPU, 700 tokens.
Without GPUs two processes and gloo, plain DDP.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from importlib.util import find_spec
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gpu_parts import NotRun
from gpu_parts.world import GIB, ROOT, TINY, StepClock, World, spread
from llava_sculpt.config_reader import parse_config
from llava_sculpt.errors import first_line
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.files import ADAPTER_FILE, MASKS_FILE, read_tensors
from llava_sculpt.train import train as training

ROOM = 17e9  # bytes of disk
ENGINES = {"DDP": "", "ZeRO-2": f"{ROOT}/configs/zero2.json", "ZeRO-3": f"{ROOT}/configs/zero3.json"}


def cases(world: World) -> Iterator[dict[str, Any]]:
    count = torch.cuda.device_count()
    if not world.tiny and count < 2:
        raise NotRun("one GPU")
    count = max(count, 2)
    here = {name: file for name, file in ENGINES.items() if not file or (find_spec("deepspeed") and not world.tiny)}
    wrong = []
    for row in equality(world, count, here):
        wrong += [row["case"]] if row.get("right") == "NO" else []
        yield row
    if not world.tiny:
        yield from full_size(world, count, here)
    if wrong:
        raise AssertionError(f"not what one process trains: {', '.join(wrong)}")


def equality(world: World, count: int, engines: dict[str, str]) -> Iterator[dict[str, Any]]:
    """The same samples in the same steps: adapters to 1e-5, masks to the byte."""
    folder = world.folder / "equality"
    shutil.rmtree(folder, ignore_errors=True)
    flags = {
        "model_name_or_path": str(TINY),
        "model_max_length": str(find_base_checkpoint(str(TINY)).image_tokens + 32),
        "bf16": "false",
        "tf32": "false",
        "lora_r": "8",
        "lora_dropout": "0",
        "ignore_plan": "true",
        # By then the entries of B differ by more than rounding, which would choose other masks.
        "max_steps": "8",
        "sculpt_warmup_steps": "5",
        "learning_rate": "5e-3",
    }

    def run(name: str, processes: int, deepspeed: str) -> Path:
        output, batch = folder / name, str(2 * count // processes)
        own = {"output_dir": str(output), "per_device_train_batch_size": batch, "deepspeed": deepspeed}
        train_together(world, processes, world.flags("sculpt", **flags, **own), bool(deepspeed))
        return output

    one = run("one", 1, "")
    for name, file in engines.items():
        row: dict[str, Any] = {"table": f"{count} processes against one", "case": name}
        try:
            several = run(name, count, file)
        except RuntimeError as error:
            yield row | {"error": str(error)}
            continue
        ours, theirs = (read_tensors(run / ADAPTER_FILE) for run in (several, one))
        off = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
        masks, expected = (read_tensors(run / MASKS_FILE) for run in (several, one))
        same = masks.keys() == expected.keys() and all(torch.equal(masks[key], expected[key]) for key in masks)
        right = "yes" if same and off <= 1e-5 else "NO"
        yield row | {"right": right, "largest difference": off, "same masks": "yes" if same else "NO"}
    shutil.rmtree(folder)


def full_size(world: World, count: int, engines: dict[str, str]) -> Iterator[dict[str, Any]]:
    folder = world.folder / "full"
    layers = None if shutil.disk_usage(world.folder).free > ROOM else 8
    table = f"{'All' if layers is None else layers} layers of the 7B, 1 and {count} GPUs"
    try:
        # In a process of its own, whose memory on the card ends with it.
        writer = world.processes.Process(target=write_checkpoint, args=(world, folder, layers))
        writer.start()
        writer.join()
        if writer.exitcode:
            raise RuntimeError("the checkpoint could not be written")
        small = "ZeRO-2" if "ZeRO-2" in engines else "DDP"
        runs = [(small, "sculpt", 1), (small, "sculpt", count), (small, "lora", count)]
        runs += [("ZeRO-3", "sculpt", count)] if "ZeRO-3" in engines else []
        one: float | None = None
        for engine, method, processes in runs:
            row: dict[str, Any] = {"table": table, "case": f"{engine}, {method}, {processes} GPUs"}
            shutil.rmtree(world.folder / "run", ignore_errors=True)
            flags = world.flags(method, model_name_or_path=str(folder), deepspeed=engines[engine])
            try:
                found = train_together(world, processes, flags, engine != "DDP")
            except RuntimeError as error:
                yield row | {"error": str(error)}
                continue
            seconds = spread(found["seconds"])
            assert seconds is not None
            rate = found["batch"] * processes * world.tokens / seconds["median"]
            one = rate if processes == 1 else one
            yield row | {
                "s": seconds,
                "tokens/s": rate,
                "x one GPU": rate / one if one and method == "sculpt" else None,
                "GiB in use": found["peak"] / GIB,
                "GiB reserved": found["reserved"] / GIB,
            }
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_checkpoint(world: World, folder: Path, layers: int | None) -> None:
    world.random_model(layers).save_pretrained(folder, max_shard_size="5GB")
    for name in ("tokenizer.model", "preprocessor_config.json"):
        shutil.copy(world.checkpoint.path / name, folder)


def train_together(world: World, processes: int, flags: list[str], deepspeed: bool) -> dict[str, Any]:
    """Train as a launcher's processes do; what the first measured.

    Raises:
        RuntimeError: a process failed; the part's log says why.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    receive, send = world.processes.Pipe(duplex=False)
    ranks = [
        world.processes.Process(target=one_rank, args=(rank, processes, port, flags, deepspeed, send))
        for rank in range(processes)
    ]
    for process in ranks:
        process.start()
    send.close()
    running = {process.sentinel: process for process in ranks}
    while running:
        for sentinel in wait_for(list(running)):
            running.pop(sentinel).join()
        if any(process.exitcode for process in ranks):  # the others would wait for it
            for process in running.values():
                process.kill()
    try:
        found: dict[str, Any] = receive.recv()
    except EOFError:
        found = {"error": f"failed: exit codes {[process.exitcode for process in ranks]}"}
    if "error" in found or any(process.exitcode for process in ranks):
        raise RuntimeError(found.get("error", "a process failed"))
    return found


def one_rank(rank: int, processes: int, port: int, flags: list[str], deepspeed: bool, result: Any) -> None:
    """Like a process of torchrun, whose environment tells it its place; the first one sends what it measured."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
    if processes > 1 or deepspeed:
        os.environ |= {name: str(value) for name, value in place.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    else:  # nothing has asked for the GPUs yet
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    clocks = []
    build = training.build_trainer

    def timed(*arguments: Any, **options: Any) -> Any:
        trainer = build(*arguments, **options)
        clocks.append(StepClock(trainer.args.device))
        trainer.add_callback(clocks[0])
        return trainer

    try:
        config = parse_config(flags)
        with patch.object(training, "build_trainer", timed):
            training.train(config, flags)
    except Exception as error:
        if rank == 0:
            result.send({"error": f"{type(error).__name__}: {first_line(error)}"})
        raise
    if rank == 0:
        on_card = torch.cuda.is_available()
        result.send(
            {
                "seconds": clocks[0].seconds,
                "batch": config.training.per_device_train_batch_size,
                "peak": torch.cuda.max_memory_allocated() if on_card else 0,
                "reserved": torch.cuda.max_memory_reserved() if on_card else 0,
            }
        )
