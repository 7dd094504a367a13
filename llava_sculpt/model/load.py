"""Loading: the base model for training, and anything a run leaves behind for inference."""

from __future__ import annotations

import hashlib
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration
from transformers.utils import is_bitsandbytes_available
from transformers.utils.logging import disable_progress_bar

from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.model.adapter import base_of, load_adapter
from llava_sculpt.model.checkpoint import BaseCheckpoint, find_base_checkpoint
from llava_sculpt.model.files import ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE, RUN_FILE
from llava_sculpt.model.lora import lora_pairs
from llava_sculpt.records import file_sha256


def load_base(
    checkpoint: BaseCheckpoint,
    dtype: torch.dtype,
    *,
    bits: int = 16,
    double_quant: bool = True,
    quant_type: str = "nf4",
    vision_tower: str | None = None,
) -> LlavaForConditionalGeneration:
    """The frozen base model in `dtype`, with 8- or 4-bit LLM weights if asked (tower, connector, lm_head are not).

    Nothing else of PEFT's `prepare_model_for_kbit_training` is needed: what stays 16-bit is frozen and computes as it
    does in a 16-bit run (Llama's norms go through fp32 by themselves), and activation checkpointing passes gradients
    on to LoRA without inputs that require them.

    Args:
        vision_tower: CLIP folder whose weights replace the checkpoint's tower.

    Raises:
        UserError: bitsandbytes missing, or a tower of another shape.
    """
    check_bits(bits)
    if not sys.stderr.isatty():  # a log file gets lines
        disable_progress_bar()
    options: dict[str, Any] = {}
    if bits != 16:
        options["quantization_config"] = _quantization(bits, dtype, double_quant, quant_type)
    model = LlavaForConditionalGeneration.from_pretrained(
        checkpoint.path, dtype=dtype, local_files_only=True, attn_implementation="sdpa", **options
    )
    if vision_tower is not None:
        _replace_tower(model, vision_tower)
    return model.requires_grad_(False)


def check_bits(bits: int) -> None:
    """Refuse 8- and 4-bit weights that could not be loaded here; quick, so that it can come before everything else.

    Raises:
        UserError: bitsandbytes is missing, or too old for transformers.
    """
    if bits != 16 and not is_bitsandbytes_available():
        raise UserError(f"bits: {bits} needs bitsandbytes, which is missing or too old: pip install -U bitsandbytes")


def _quantization(bits: int, dtype: torch.dtype, double_quant: bool, quant_type: str) -> BitsAndBytesConfig:
    # 8-bit layers announce at every call that they compute in fp16: hundreds of lines a step under bf16.
    logging.getLogger("bitsandbytes.autograd._functions").addFilter(_is_no_cast_notice)
    return BitsAndBytesConfig(
        load_in_8bit=bits == 8,
        load_in_4bit=bits == 4,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
        # Bare module names are matched against the full path and would skip nothing: these are patterns.
        # With a list of our own transformers forgets its default, which is lm_head.
        llm_int8_skip_modules=[".*multi_modal_projector", ".*vision_tower", "lm_head"],
    )


def _is_no_cast_notice(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("MatMul8bitLt: inputs will be cast")


def _replace_tower(model: LlavaForConditionalGeneration, folder: str) -> None:
    from transformers import CLIPVisionModel

    try:
        tower = CLIPVisionModel.from_pretrained(folder)
        model.model.vision_tower.load_state_dict(tower.state_dict())
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"vision_tower: {folder} does not fit the checkpoint's tower ({reason})") from error


@dataclass(frozen=True)
class Inference:
    """A model ready to answer, with what turns text and images into its inputs."""

    model: nn.Module
    tokenizer: LlavaTokenizer
    preprocessor: ImagePreprocessor
    checkpoint: BaseCheckpoint
    adapter: Path | None

    def fingerprint(self) -> str:
        """sha256 over the base (its fingerprint), the adapter's and connector's files, dtype and kind of device."""
        weight: Any = next(self.model.parameters())
        parts = [self.checkpoint.fingerprint(), str(weight.dtype), weight.device.type]
        if self.adapter is not None:
            files = [self.adapter / name for name in (ADAPTER_CONFIG, ADAPTER_FILE, CONNECTOR_FILE)]
            parts += [f"{file.name}:{file_sha256(file)}" for file in files if file.is_file()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def load_for_inference(path: str, *, base: str | None = None, dtype: torch.dtype | None = None) -> Inference:
    """Load a base model, an adapter folder (with its connector), or a merged model.

    Args:
        path: folder or Hub id; a folder with adapter_config.json is an adapter.
        base: base checkpoint to use instead of the one the adapter names.
        dtype: default bfloat16 on a GPU, float32 on a CPU.

    Raises:
        UserError: what is missing or does not fit, before any weight is loaded.
    """
    dtype = dtype or (torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    folder = Path(path)
    is_adapter = (folder / ADAPTER_CONFIG).is_file()
    if not is_adapter and (folder / RUN_FILE).is_file():
        raise UserError(f"{path}: this run has not finished: run the same training command again to continue it")
    checkpoint = find_base_checkpoint(base_of(folder, base) if is_adapter else path)
    model: nn.Module = load_base(checkpoint, dtype)
    if is_adapter:
        model = load_adapter(model, folder, checkpoint)
        if dtype == torch.float32 and any(pair.magnitude is not None for pair in lora_pairs(model)):
            # PEFT takes the norms of W + BA anew for every token; merged in float32 the model answers the same.
            model.merge_adapter()
    model.eval()
    if torch.cuda.is_available():
        model.to("cuda")
    return Inference(
        model,
        LlavaTokenizer.from_dir(checkpoint.path),
        ImagePreprocessor.from_dir(checkpoint.path),
        checkpoint,
        folder if is_adapter else None,
    )
