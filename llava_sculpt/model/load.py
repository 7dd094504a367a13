"""Loading the base model: dtype, 4- and 8-bit weights, another vision tower."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import BitsAndBytesConfig, LlavaConfig, LlavaForConditionalGeneration
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils import is_bitsandbytes_available
from transformers.utils.logging import disable_progress_bar

from llava_sculpt.errors import UserError, first_line
from llava_sculpt.model.base_config import known_config
from llava_sculpt.model.checkpoint import BaseCheckpoint
from llava_sculpt.model.expected import expected_shapes, key_problems
from llava_sculpt.model.files import check_finite
from llava_sculpt.model.layout import TOWER, is_buffer, memory_name
from llava_sculpt.model.shards import Stored, check_shards, model_tensors, tower_tensors
from llava_sculpt.progress import waiting


def local_device() -> torch.device:
    """This process's own GPU, where launchers have chosen one, else the first; the CPU without GPUs."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_base(
    checkpoint: BaseCheckpoint,
    dtype: torch.dtype,
    *,
    device: torch.device | str = "cpu",
    bits: int = 16,
    double_quant: bool = True,
    quant_type: str = "nf4",
    vision_tower: str | None = None,
) -> LlavaForConditionalGeneration:
    """The frozen base model in `dtype`, with 8- or 4-bit LLM weights if asked (tower, connector, lm_head are not).

    To a GPU the weights go one tensor after the other: host memory holds the pages of the weight files, which all
    processes share, and the few tensors that are being converted. On the CPU weights in the files' dtype stay such
    pages, and other ones are a copy that each process has to itself. Under ZeRO-3 only the first process reads values,
    and DeepSpeed places them.

    Nothing else of PEFT's `prepare_model_for_kbit_training` is needed: what stays 16-bit is frozen and computes as it
    does in a 16-bit run (Llama's norms go through fp32 by themselves), and activation checkpointing passes gradients
    on to LoRA without inputs that require them.

    Args:
        device: where the weights go (a GPU with its index); under ZeRO-3 it is not looked at.
        vision_tower: CLIP folder whose weights replace the checkpoint's tower.

    Raises:
        UserError: bitsandbytes missing, weights that are missing, misshapen, NaN or infinite (finding these takes
            0.3 s per GB on one CPU core), or a tower of another shape.
    """
    check_bits(bits)
    if vision_tower is not None:
        _check_tower(Path(vision_tower), checkpoint)
    disable_progress_bar()  # transformers' own
    # ZeRO-3 places the weights itself.
    placed = {} if is_deepspeed_zero3_enabled() else {"device_map": {"": torch.device(device)}}
    options: dict[str, Any] = {**placed}
    if bits != 16:
        options["quantization_config"] = _quantization(bits, dtype, double_quant, quant_type)
    # Weights were checked by their headers when the checkpoint was opened; whatever that did not see fails here.
    loader: Any = LlavaForConditionalGeneration.from_pretrained  # its type says nothing of the report
    try:
        with waiting(f"loading {checkpoint.path}"):
            model, report = loader(
                checkpoint.path,
                config=LlavaConfig.from_dict(known_config(checkpoint.config)),
                dtype=dtype,
                local_files_only=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                **options,
            )
    except (ImportError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(f"{checkpoint.path}: cannot be loaded: {first_line(error)}") from error
    odd = {*report["missing_keys"], *(memory_name(key) for key in report["unexpected_keys"])}
    odd = {name for name in odd if not is_buffer(name)}
    if odd or report["mismatched_keys"]:
        names = sorted({*odd, *map(str, report["mismatched_keys"])})
        raise UserError(f"{checkpoint.path}: {len(names)} weights do not fit config.json, such as {names[0]}")
    _check_finite(model, model_tensors(checkpoint.path), checkpoint.path, shown=bits == 16)
    if vision_tower is not None:
        model.model.vision_tower = _other_tower(model.model.vision_tower, Path(vision_tower), dtype, placed)
    model.requires_grad_(False)
    return model


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


def _check_finite(model: nn.Module, files: Iterable[Stored], folder: Path, *, shown: bool = True) -> None:
    """`check_finite` where the weights are; if they are quantised (not `shown`) or cut up by ZeRO-3, in the files."""
    if shown and not is_deepspeed_zero3_enabled():
        check_finite(model.named_parameters(), folder)
    else:
        check_finite(((tensor.name, tensor.load()) for tensor in files), folder)


def _check_tower(folder: Path, checkpoint: BaseCheckpoint) -> None:
    """Refuse another tower than one of the checkpoint's shape, by the headers of its files."""
    problems = check_shards(folder)
    if not problems:
        expected = {name: shape for name, shape in expected_shapes(checkpoint.config).items() if name.startswith(TOWER)}
        problems = key_problems({tensor.name: tensor.shape for tensor in tower_tensors(folder)}, expected, folder)
    if problems:
        raise UserError([f"vision_tower: {problem}" for problem in problems])


def _other_tower(tower: Any, folder: Path, dtype: torch.dtype, placed: dict[str, Any]) -> nn.Module:
    """A tower of the same configuration with the weights of a CLIP folder."""
    options: dict[str, Any] = {"config": tower.config, "dtype": dtype, "attn_implementation": "sdpa", **placed}
    try:
        other = type(tower).from_pretrained(folder, local_files_only=True, **options)
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"vision_tower: {folder} cannot be loaded ({first_line(error)})") from error
    _check_finite(other, tower_tensors(folder), folder)
    return other
