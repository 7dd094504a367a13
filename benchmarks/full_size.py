"""Training at the real size on this machine's GPUs: memory beside the estimate of `llava-sculpt plan`, and time.

    python benchmarks/full_size.py --folder DIR                       # LLaVA-1.5-7B, every case: 14 GB in DIR
    python benchmarks/full_size.py --folder DIR --tokens 2048 --only sculpt-zero2 -- --lora_r 64 --ignore_plan true

Weights are random and samples made up, which changes neither memory nor time. The rest is the real thing: a checkpoint
in shards, configs/iconqa_lora.yaml and iconqa_sculpt.yaml, and one process per GPU; only that every step is logged,
where the configurations log every tenth. What follows `--` goes to every training. The masks are made at step 2; the
median time is taken over the steps after the fifth. Without a GPU (try `--layers 1`) everything is float32.

  planned    GiB by `plan`, without its allowance for CUDA, libraries and fragmentation
  allocated  most GiB that PyTorch had in use at once (run.json of process 0)
  on GPU     most GiB that any GPU had in use beyond what it had before, by nvidia-smi: what must fit (0: not known)
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measurements import write_results
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration

from llava_sculpt.errors import UserError
from llava_sculpt.memory.parts import OUTSIDE_BYTES
from llava_sculpt.memory.plan import read_checkpoint_config, run_plan

ROOT = Path(__file__).parents[1]
TINY = ROOT / "data" / "tiny_llava"
GIB = 2**30
SAMPLES, WARM_UP = 64, 4  # the first interval that counts is that from the fifth step to the sixth

# Method, DeepSpeed configuration (none: plain PyTorch), bits of the base.
CASES = {
    "lora-zero2": ("lora", "zero2", 16),
    "sculpt-zero2": ("sculpt", "zero2", 16),
    "sculpt-zero2-4bit": ("sculpt", "zero2", 4),
    "sculpt-zero2-8bit": ("sculpt", "zero2", 8),
    "lora": ("lora", None, 16),
    "sculpt": ("sculpt", None, 16),
    "lora-zero3": ("lora", "zero3", 16),
    "sculpt-zero3": ("sculpt", "zero3", 16),
    "sculpt-zero3-offload": ("sculpt", "zero3_offload", 16),
}


def write_checkpoint(folder: Path, size: str, layers: int | None) -> None:
    """A LLaVA-1.5 of the real shape with random bf16 weights, in shards, with the tiny model's tokenizer."""
    config = read_checkpoint_config(f"llava-hf/llava-1.5-{size}-hf")
    if layers is not None:
        config["text_config"]["num_hidden_layers"] = layers
    config["pad_token_id"] = config["text_config"]["pad_token_id"] = config["image_token_index"] + 1
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    model.save_pretrained(folder, max_shard_size="5GB")
    shutil.copy(TINY / "tokenizer.model", folder)
    preprocessor = json.loads((TINY / "preprocessor_config.json").read_text())
    side = model.config.vision_config.image_size
    preprocessor |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))


def write_data(folder: Path) -> None:
    """Samples with an image each and more text than any length asked for: `--model_max_length` cuts them all alike."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    records = []
    for number in range(SAMPLES):
        Image.fromarray(rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "red " * 4096}]
        records.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "train.json").write_text(json.dumps(records))


class UsedMemory:
    """Most bytes that any GPU has in use inside the ``with`` block beyond its own before it; 0 if nvidia-smi fails."""

    def __enter__(self) -> UsedMemory:
        self.bytes, self.before = 0, self.used()
        self.done = threading.Event()
        self.sampler = threading.Thread(target=self.sample)
        self.sampler.start()
        return self

    def sample(self) -> None:
        while not self.done.wait(0.2):
            grown = [now - before for now, before in zip(self.used(), self.before, strict=False)]
            self.bytes = max([self.bytes, *grown])

    @staticmethod
    def used() -> list[int]:
        """Bytes in use on each GPU; none where nvidia-smi does not tell."""
        query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
        try:
            found = subprocess.run(query, capture_output=True, text=True, check=True).stdout
            return [int(line) * 2**20 for line in found.splitlines()]
        except (OSError, subprocess.CalledProcessError, ValueError):
            return []

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.sampler.join()


def measure(name: str, folder: Path, tokens: int, steps: int, more: list[str]) -> dict[str, Any]:
    """Plan one case and train it; a case that fails has `error` in place of the numbers."""
    method, engine, bits = CASES[name]
    output = folder / "runs" / name
    shutil.rmtree(output, ignore_errors=True)
    flags = ["--config", f"{ROOT}/configs/iconqa_{method}.yaml", "--bits", str(bits)]
    flags += ["--model_name_or_path", str(folder / "model"), "--model_max_length", str(tokens)]
    flags += ["--data_path", str(folder / "data" / "train.json"), "--image_folder", str(folder / "data")]
    flags += ["--deepspeed", "" if engine is None else f"{ROOT}/configs/{engine}.json"]
    flags += ["--max_steps", str(steps), "--save_strategy", "no", "--logging_steps", "1", "--output_dir", str(output)]
    flags += ["--sculpt_warmup_steps", "2"] if method == "sculpt" else []
    flags += more if torch.cuda.is_available() else ["--bf16", "false", "--tf32", "false", *more]
    processes = max(torch.cuda.device_count(), 1)
    try:
        with contextlib.redirect_stdout(io.StringIO()) as answer:
            run_plan(flags, processes, 24, None, as_json=True)
    except UserError as error:
        return {"case": name, "error": "\n".join(error.problems)}
    planned = json.loads(answer.getvalue())
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    times, last = [], ""
    with UsedMemory() as used:
        train = subprocess.Popen(
            [*launch, f"{ROOT}/llava_sculpt/train/train.py", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )
        assert train.stdout is not None
        for line in train.stdout:
            times += [time.perf_counter()] if re.search(r"step +\d+/\d+ ", line) else []
            last = (last + line)[-3000:]
    if train.wait() or len(times) < steps:
        return {"case": name, "error": last}
    record = json.loads((output / "run.json").read_text())
    shutil.rmtree(output)
    seconds = [after - before for before, after in zip(times[WARM_UP:], times[WARM_UP + 1 :], strict=False)]
    return {
        "case": name,
        "tokens": tokens,
        "processes": processes,
        "planned_gib": (planned["total"] - OUTSIDE_BYTES) / GIB,
        "allocated_gib": record["peak_memory_bytes"] / GIB,
        "on_gpu_gib": used.bytes / GIB,
        "parts": planned["parts"],
        "step_s": statistics.median(seconds),
        "tokens_per_s": planned["tokens_per_step"] / statistics.median(seconds),
        "tflops_per_gpu": planned["flops"] / steps / statistics.median(seconds) / processes / 1e12,
    }


def print_case(case: dict[str, Any]) -> None:
    if "error" in case:
        print(f"{case['case']}: failed\n{case['error']}", flush=True)
        return
    print(
        f"{case['case']:22}{case['planned_gib']:9.2f}{case['allocated_gib']:11.2f}{case['on_gpu_gib']:9.2f}"
        f"{case['step_s']:9.3f}{case['tokens_per_s']:10.0f}{case['tflops_per_gpu']:9.1f}",
        flush=True,
    )


def main() -> int:
    """See the top of the file; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoint, data and runs; kept between calls")
    parser.add_argument("--size", choices=["7b", "13b"], default="7b")
    parser.add_argument("--layers", type=int, help="fewer decoder layers than the real model (for a smaller machine)")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--tokens", type=int, default=800, help="of every sample, with its image (default 800)")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("more", nargs="*", metavar="-- FLAGS", help="for every training")
    arguments = parser.parse_args()
    if arguments.steps < WARM_UP + 2:
        parser.error(f"--steps: at least {WARM_UP + 2}")
    layers = "all" if arguments.layers is None else arguments.layers
    folder = arguments.folder.resolve() / f"{arguments.size}-{layers}-layers"
    if not (folder / "data" / "train.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # In a process of its own, whose GPU memory ends with it.
        writer = multiprocessing.get_context("spawn").Process(
            target=write_checkpoint, args=(folder / "model", arguments.size, arguments.layers)
        )
        writer.start()
        writer.join()
        if writer.exitcode:
            raise SystemExit("the checkpoint could not be written")
        write_data(folder / "data")
    print(f"{'case':22}{'planned':>9}{'allocated':>11}{'on GPU':>9}{'step s':>9}{'tokens/s':>10}{'TFLOP/s':>9}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = []
    for name in arguments.only:
        cases.append(measure(name, folder, arguments.tokens, arguments.steps, arguments.more))
        print_case(cases[-1])
        if arguments.json:
            write_results(arguments.json, cases, device, arguments.steps)
    return int(any("error" in case for case in cases))


if __name__ == "__main__":
    sys.exit(main())
