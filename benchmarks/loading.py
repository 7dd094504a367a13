"""Host memory of several processes that load one model, as the ranks of a training or an evaluation do, and time.

    python benchmarks/loading.py                           # random fp16 weights asked for in bf16, two processes
    python benchmarks/loading.py --model DIR --processes 4 # a checkpoint in Hugging Face layout

  host      to the CPU in the dtype asked for, as every rank did before its weights went to its GPU: the baseline
  streamed  `load_base` to the process's GPU
  stored    to the CPU in the dtype of the files

Memory is the PSS of all processes together (a page that n of them share counts 1/n in each) beyond what they had after
loading the tiny model, in copies of the weight files: the peak while they load, and what is left once all have.
`private` is the anonymous part of the peak, `shared` that of the weight files' pages, which the kernel may take back.

Without a GPU `streamed` loads to the device "meta", and each copy to it does on the host what PyTorch's blocking copy
to a GPU does there: a cast into a temporary (`copy_kernel_cuda`), then every value is read. What is not measured so is
CUDA's own memory, which does not depend on the model.
"""

from __future__ import annotations

import argparse
import multiprocessing
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from measurements import write_results
from transformers import LlavaConfig, LlavaForConditionalGeneration, core_model_loading

from llava_sculpt.model import load
from llava_sculpt.model.checkpoint import BaseCheckpoint, read_config
from llava_sculpt.model.shards import model_tensors, weight_files

TINY = Path(__file__).parents[1] / "data" / "tiny_llava"
KB = 1024


def write_model(folder: Path, layers: int) -> None:
    """A LLaVA with random fp16 weights and decoder layers of the 7B's shape, in shards, without a tokenizer."""
    text = {"model_type": "llama", "num_hidden_layers": layers, "vocab_size": 8192}  # Llama-7B but for these
    vision = {"model_type": "clip_vision_model", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "image_size": 48, "patch_size": 8}
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    model = LlavaForConditionalGeneration(LlavaConfig(text_config=text, vision_config=vision, image_token_index=8000))
    model.save_pretrained(folder, max_shard_size="1GB")


@contextmanager
def stand_in() -> Iterator[torch.device]:
    """The device "meta", with each copy of a weight to it working on the host as one to a GPU does."""

    def copy(weight: Any, device: Any = None, dtype: torch.dtype | None = None) -> torch.Tensor:
        on_host = weight[...].to(dtype=dtype)
        torch.aminmax(on_host)
        return torch.empty_like(on_host, device=device)

    with ExitStack() as patches:
        patches.enter_context(patch.object(core_model_loading, "_materialize_copy", copy))
        patches.enter_context(patch.object(load, "check_finite", lambda *_: None))  # looks at the GPU's memory
        yield torch.device("meta")


def load_once(number: int, folder: Path, case: str, dtype: torch.dtype, parent: Connection) -> None:
    """One process: says when it is ready, loads when told to, says when it has, holds the model until told to end."""
    torch.set_num_threads(1)
    checkpoint, tiny = (BaseCheckpoint(path, read_config(path)) for path in (folder, TINY))
    with ExitStack() as context:
        device = torch.device("cpu")
        if case == "streamed" and torch.cuda.is_available():
            device = torch.device("cuda", number % torch.cuda.device_count())
        elif case == "streamed":
            device = context.enter_context(stand_in())
        load.load_base(tiny, dtype, device=device)  # imports, and on a GPU its context
        parent.send(None)
        parent.recv()
        started = time.perf_counter()
        model = load.load_base(checkpoint, dtype, device=device)
        if device.type == "cpu":  # pages that nothing has read yet are not in memory
            load.check_finite(model.named_parameters(), folder)
        seconds = time.perf_counter() - started
        on_gpu = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        parent.send((seconds, on_gpu))
        parent.recv()


def memory(processes: list[BaseProcess]) -> dict[str, int]:
    """Bytes of PSS that the processes have together: all, the anonymous part, and that of files."""
    found = {"Pss": 0, "Pss_Anon": 0, "Pss_File": 0}
    for process in processes:
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in found:
                found[name] += int(value.split()[0]) * KB
    return found


def measure(folder: Path, case: str, dtype: torch.dtype, count: int, start: str = "spawn") -> dict[str, Any]:
    """Memory in copies of the weight files, seconds of the slowest process, bytes on the GPU."""
    context: Any = multiprocessing.get_context(start)
    pipes = [context.Pipe() for _ in range(count)]
    processes: list[BaseProcess] = [
        context.Process(target=load_once, args=(number, folder, case, dtype, pipes[number][1]))
        for number in range(count)
    ]
    for process in processes:
        process.start()
    ours = [pipe[0] for pipe in pipes]
    for pipe, theirs in pipes:
        theirs.close()  # a process that fails then shows as EOFError
        pipe.recv()
    before = memory(processes)
    for pipe in ours:
        pipe.send(None)
    peak = before
    while not all(pipe.poll() for pipe in ours):
        now = memory(processes)
        peak = max(peak, now, key=lambda found: found["Pss"])
        time.sleep(0.005)
    after = memory(processes)
    answers = [pipe.recv() for pipe in ours]
    for pipe, process in zip(ours, processes, strict=True):
        pipe.send(None)
        process.join()
    size = sum(file.stat().st_size for file in weight_files(folder))
    return {
        "case": case,
        "dtype": str(dtype),
        "processes": count,
        "peak": (peak["Pss"] - before["Pss"]) / size,
        "private": (peak["Pss_Anon"] - before["Pss_Anon"]) / size,
        "shared": (peak["Pss_File"] - before["Pss_File"]) / size,
        "left": (after["Pss"] - before["Pss"]) / size,
        "seconds": max(seconds for seconds, _ in answers),
        "on_gpu": max(on_gpu for _, on_gpu in answers) / size,
    }


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a checkpoint folder (default: one with random weights)")
    parser.add_argument("--layers", type=int, default=3, help="of the random weights, 405 MB each (default 3)")
    parser.add_argument("--processes", type=int, default=max(2, torch.cuda.device_count()))
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp())
    try:
        folder = options.model or scratch
        if options.model is None:
            write_model(folder, options.layers)
        print(f"{'case':10}{'dtype':>16}{'peak':>7}{'private':>9}{'shared':>8}{'left':>7}{'seconds':>9}{'on GPU':>8}")
        stored, found = next(model_tensors(folder)).dtype, []
        for case, dtype in (("host", torch.bfloat16), ("streamed", torch.bfloat16), ("stored", stored)):
            found.append(measure(folder, case, dtype, options.processes))
            row = found[-1]
            print(
                f"{case:10}{row['dtype']:>16}{row['peak']:7.2f}{row['private']:9.2f}{row['shared']:8.2f}"
                f"{row['left']:7.2f}{row['seconds']:9.1f}{row['on_gpu']:8.2f}",
                flush=True,
            )
    finally:
        shutil.rmtree(scratch)
    if options.json:
        write_results(options.json, found, torch.device("cuda" if torch.cuda.is_available() else "cpu"), 1)


if __name__ == "__main__":
    sys.exit(main())
