"""Anything a run leaves behind, or a base model, ready to answer."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn

from llava_sculpt.artifacts.merge import WeightUpdate
from llava_sculpt.artifacts.open import open_base_of, open_checkpoint
from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.model.adapter import load_adapter, read_adapter
from llava_sculpt.model.checkpoint import BaseCheckpoint
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, RUN_FILE
from llava_sculpt.model.layout import EMBEDDING
from llava_sculpt.model.load import load_base, local_device
from llava_sculpt.model.lora import ADAPTER, lora_pairs
from llava_sculpt.model.shards import model_tensors
from llava_sculpt.model.whole import check_whole
from llava_sculpt.records import file_sha256


@dataclass(frozen=True)
class Inference:
    """A model ready to answer, with what turns text and images into its inputs."""

    model: nn.Module
    tokenizer: LlavaTokenizer
    preprocessor: ImagePreprocessor
    checkpoint: BaseCheckpoint
    adapter: Path | None

    @property
    def weight(self) -> torch.Tensor:
        """Any weight, of which dtype and device are those of all the base's."""
        return next(self.model.parameters())

    @property
    def merged(self) -> bool:
        """Whether the adapter is in the weights, and no longer beside them."""
        return self.adapter is not None and not isinstance(self.model, PeftModel)

    def fingerprint(self) -> str:
        """sha256 over the base (its fingerprint), the adapter's and connector's files, dtype and kind of device."""
        parts = [self.checkpoint.fingerprint(), str(self.weight.dtype), self.weight.device.type]
        if self.adapter is not None:
            files = [self.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE)]
            parts += [f"{file.name}:{file_sha256(file)}" for file in files if file.is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_for_inference(
    path: str,
    *,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    merge: bool = False,
    beside: Inference | None = None,
) -> Inference:
    """Load a base model, an adapter folder (with its connector), or a merged model.

    Args:
        path: folder or Hub id; a folder with adapter_config.json is an adapter.
        base: base checkpoint to use instead of the one the adapter names.
        dtype: default `inference_dtype`.
        merge: in 16 bits add an adapter to the weights in memory, as `merge` does on disk: the same answers up to
            rounding, with fewer kernels. In float32 it stays beside them, and answers as in training.
        beside: a model loaded before; weights that are the same in both are in memory once.

    Raises:
        UserError: what is missing or does not fit, before any weight is loaded.
    """
    folder = Path(path)
    is_adapter = os.path.isfile(folder / ADAPTER_CONFIG)
    if not is_adapter and os.path.isfile(folder / RUN_FILE):  # of a training that has not come to its end
        check_whole(folder)
    saved = read_adapter(folder) if is_adapter else None
    checkpoint = open_base_of(folder, base) if is_adapter else open_checkpoint(path)
    dtype = dtype or inference_dtype(checkpoint)
    # A GPU might not hold both models before what they have in common is found.
    device = local_device()
    model: nn.Module = load_base(checkpoint, dtype, device="cpu" if beside is not None else device)
    if saved is not None:
        model = load_adapter(model, saved, checkpoint)
        if dtype == torch.float32 and any(pair.magnitude is not None for pair in lora_pairs(model)):
            # PEFT takes the norms of W + BA anew for every token; merged in float32 the model answers the same.
            model.merge_adapter()
    model.eval()
    if beside is not None:
        _share_weights(model, beside.model)
    model.to(device)
    if merge and dtype != torch.float32 and isinstance(model, PeftModel):
        model = _merged(model)
    return Inference(
        model,
        LlavaTokenizer.from_dir(checkpoint.path),
        ImagePreprocessor.from_dir(checkpoint.path),
        checkpoint,
        folder if is_adapter else None,
    )


def inference_dtype(checkpoint: BaseCheckpoint) -> torch.dtype:
    """The dtype a model answers in: float32 on a CPU; on a GPU bfloat16 where its weights are stored so, else float16.

    float16, which the published LLaVA-1.5 is stored and evaluated in, has logits eight times as fine as bfloat16 and so
    fewer near-ties, but ends at 65,504: what a bfloat16 model holds or computes beyond that would be infinite.
    """
    if not torch.cuda.is_available():
        return torch.float32
    stored = next((t.dtype for t in model_tensors(checkpoint.path) if t.name == EMBEDDING), None)
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float16


@torch.no_grad()
def _merged(model: PeftModel) -> nn.Module:
    """The base model inside, with the adapter in its weights: each computed in float32 and rounded once."""
    for pair in lora_pairs(model):
        weight: Any = pair.layer.get_base_layer().weight
        update = WeightUpdate(pair.lora_A, pair.lora_B, pair.layer.scaling[ADAPTER], pair.magnitude)
        weight.copy_(update.apply(weight))
    return cast(nn.Module, model.unload())


def _share_weights(model: nn.Module, other: nn.Module) -> None:
    """Put the parameters of `other` in the place of those that have the same name in the base model, and values."""
    known = {_base_name(name): parameter for name, parameter in other.named_parameters()}
    for name, module in model.named_modules():
        for leaf, own in list(module.named_parameters(recurse=False)):
            twin = known.get(_base_name(f"{name}.{leaf}"))
            if twin is not None and twin.dtype == own.dtype and torch.equal(twin.to(own.device), own):
                setattr(module, leaf, twin)


def _base_name(name: str) -> str:
    """A parameter's name without what PEFT adds to it."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")
