"""What the parts share: a LLaVA with random weights made on the card, samples of one length, clocks and spreads."""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaConfig, LlavaForConditionalGeneration, TrainerCallback

from llava_sculpt.config import Config
from llava_sculpt.config_reader import parse_config
from llava_sculpt.data.dataset import LlavaDataset
from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.memory.plan import read_checkpoint_config
from llava_sculpt.model.checkpoint import BaseCheckpoint, find_base_checkpoint

ROOT = Path(__file__).parents[2]
TINY = ROOT / "data" / "tiny_llava"
GIB = 2**30


@dataclass(frozen=True)
class World:
    """Where a part runs: the 7B on a card, or everything tiny on the CPU.

    Attributes:
        folder: for data and checkpoints; kept between parts.
        limit: seconds after which the part is stopped.
    """

    folder: Path
    tiny: bool
    limit: float

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.tiny else "cuda")

    @property
    def processes(self) -> Any:
        """Starts other processes (a context of multiprocessing): CUDA wants fresh ones."""
        return multiprocessing.get_context("fork" if self.tiny else "spawn")

    @property
    def dtype(self) -> torch.dtype:
        """bf16 on a card, as the recipe's; float32 on a CPU."""
        return torch.float32 if self.tiny else torch.bfloat16

    @cached_property
    def checkpoint(self) -> BaseCheckpoint:
        """Configuration, tokenizer and preprocessor; its folder holds no weights."""
        folder = self.folder / "base"
        write_base(folder, self.tiny)
        return find_base_checkpoint(str(folder), weights=False)

    @property
    def tokens(self) -> int:
        """Of each sample, its image included: 700 of which 576 image, as in IconQA."""
        return self.checkpoint.image_tokens + (64 if self.tiny else 124)

    @property
    def steps(self) -> int:
        """Optimizer steps of a training whose steps are timed."""
        return 6 if self.tiny else 10

    @property
    def pictures(self) -> list[str]:
        """Names of random images in the folder."""
        return [f"{number}.png" for number in range(8 if self.tiny else 96)]

    @cached_property
    def images(self) -> Path:
        """The folder of `pictures`."""
        folder = self.folder / "pictures"
        folder.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(0)
        for name in self.pictures:
            Image.fromarray(rng.integers(0, 256, (336, 336, 3), dtype=np.uint8)).save(folder / name, compress_level=0)
        return folder

    def flags(self, method: str, **changed: str) -> list[str]:
        """The recipe of the paper's scale on samples of `tokens` tokens, for `steps` steps and without checkpoints.

        No DeepSpeed; the masks are made before the third step.

        Args:
            changed: flags by name, in place of these.
        """
        data = self.folder / "train.json"
        if not data.exists():
            # More text than fits: model_max_length cuts all samples alike.
            turns = [{"from": "human", "value": "<image>\nWhat is this?"}, {"from": "gpt", "value": "red " * 512}]
            samples = [{"id": name, "image": name, "conversations": turns} for name in self.pictures]
            data.write_text(json.dumps(samples))
        flags = {
            "config": f"{ROOT}/configs/iconqa_{method}.yaml",
            "model_name_or_path": str(self.checkpoint.path),
            "data_path": str(data),
            "image_folder": str(self.images),
            "model_max_length": str(self.tokens),
            "output_dir": str(self.folder / "run"),
            "max_steps": str(self.steps),
            "deepspeed": "",
            "save_strategy": "no",
            "disable_tqdm": "true",
        }
        if method == "sculpt":
            flags["sculpt_warmup_steps"] = "2"
        if self.tiny:
            flags |= {"bf16": "false", "tf32": "false", "lora_r": "8", "dataloader_num_workers": "0"}
            flags["per_device_train_batch_size"] = "2"
        return [word for name, value in (flags | changed).items() for word in (f"--{name}", value)]

    def config(self, method: str, **changed: str) -> Config:
        """What `flags` asks for."""
        return parse_config(self.flags(method, **changed))

    def dataset(self) -> LlavaDataset:
        path, checkpoint = self.checkpoint.path, self.checkpoint
        return LlavaDataset(
            self.folder / "train.json",
            self.images,
            LlavaTokenizer.from_dir(path),
            ImagePreprocessor.from_dir(path),
            self.tokens,
            checkpoint.image_tokens,
        )

    def random_model(self, layers: int | None = None, dtype: torch.dtype | None = None) -> Any:
        """A frozen LLaVA with random weights on the card, in `dtype`; the 7B takes seconds.

        Args:
            layers: of the language model; None: all.
        """
        config = LlavaConfig.from_dict(json.loads(json.dumps(self.checkpoint.config)))
        if layers is not None:
            config.text_config.num_hidden_layers = layers
        torch.manual_seed(0)
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype or self.dtype)
        try:
            with torch.device(self.device):
                model = LlavaForConditionalGeneration(config)
        finally:
            torch.set_default_dtype(before)
        return model.requires_grad_(False).eval()


def write_base(folder: Path, tiny: bool) -> None:
    """A checkpoint folder without weights: LLaVA-1.5-7B's config.json, with the tiny model's tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = read_checkpoint_config(str(TINY) if tiny else "llava-hf/llava-1.5-7b-hf")
    config["pad_token_id"] = config["text_config"]["pad_token_id"] = config["image_token_index"] + 1
    side = config["vision_config"]["image_size"]
    preprocessor = json.loads((TINY / "preprocessor_config.json").read_text())
    preprocessor |= {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    shutil.copy(TINY / "tokenizer.model", folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (folder / "config.json").write_text(json.dumps(config))


class StepClock(TrainerCallback):
    """Seconds of every optimizer step, data loading included, from the end of one to that of the next.

    Attributes:
        seconds: of the steps from the fifth on; by then the masks are made and the libraries loaded.
    """

    WARM_UP = 4

    def __init__(self, device: torch.device) -> None:
        self.device, self.ends = device, list[float]()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        wait(self.device)
        self.ends.append(time.perf_counter())

    @property
    def seconds(self) -> list[float]:
        ends = self.ends[self.WARM_UP - 1 :]
        return [after - before for before, after in pairwise(ends)]


def wait(device: torch.device) -> None:
    """Until the card has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def forget(device: torch.device) -> None:
    """Free what nothing refers to any more, and start the count of peak memory anew."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def peak_gib(device: torch.device) -> float | None:
    """Most GiB that PyTorch had in use on the card since `forget`; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) / GIB if device.type == "cuda" else None


def in_turn(ways: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of each call, which take turns so that a change of clocks meets all of them. One call before counts not.

    A way that runs out of memory has no seconds.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, call in ways.items():
            if repeat and not seconds[name]:
                continue
            wait(device)
            start = time.perf_counter()
            try:
                call()
                wait(device)
            except torch.OutOfMemoryError:
                forget(device)
                seconds[name] = []
                continue
            seconds[name].append(time.perf_counter() - start)
    return {name: found[1:] for name, found in seconds.items()}


def spread(values: Iterable[float], factor: float = 1.0) -> dict[str, float] | None:
    """Median, least and largest of `values` times `factor`; None of none."""
    found = [value * factor for value in values]
    return {"median": statistics.median(found), "low": min(found), "high": max(found)} if found else None


def matmul_flops(device: torch.device, dtype: torch.dtype) -> list[float]:
    """FLOP/s of the product of two square matrices, several times: what a step could reach at most."""
    side, calls = (8192, 8) if device.type == "cuda" else (256, 2)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(calls):
            torch.mm(a, b)

    return [2 * side**3 * calls / s for s in in_turn({"mm": products}, 5, device)["mm"]]


def read_rate(tensor: torch.Tensor) -> list[float]:
    """Seconds to read a tensor once (its sum), several times."""
    flat = tensor.view(torch.int32).flatten()
    return in_turn({"sum": lambda: flat.sum(dtype=torch.int32)}, 7, tensor.device)["sum"]
