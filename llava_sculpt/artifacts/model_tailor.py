"""Model Tailor on a trained adapter: decoder layer by decoder layer, over inputs from the training set.

One model in memory. The hidden states of the calibration samples wait on the CPU; a layer runs over all of them, hooks
add up the Hessians of its inputs, its seven matrices are edited in place, and its outputs are the next layer's inputs.
So the Hessians of one layer live at a time, and every layer sees what the fine-tuned model feeds it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import nn

from llava_sculpt.artifacts.edit import Base, check_settings, write_record
from llava_sculpt.artifacts.merge import WeightUpdate, open_adapter, rewrite_checkpoint
from llava_sculpt.artifacts.writing import check_new
from llava_sculpt.data.collator import expand_image
from llava_sculpt.data.dataset import LlavaDataset, validate_dataset
from llava_sculpt.data.images import ImagePreprocessor
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.methods.tailor import InputHessian, Tailored, tailor
from llava_sculpt.model.adapter import load_adapter, read_adapter
from llava_sculpt.model.checkpoint import BaseCheckpoint
from llava_sculpt.model.layout import LANGUAGE
from llava_sculpt.model.load import load_base, local_device
from llava_sculpt.model.lora import lora_pairs
from llava_sculpt.model.whole import read_run
from llava_sculpt.progress import counted

# Modules of a decoder layer that read one input: they share its Hessian.
_INPUTS = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("self_attn.o_proj",),
    ("mlp.gate_proj", "mlp.up_proj"),
    ("mlp.down_proj",),
)
_MODEL_MAX_LENGTH = 2048


def model_tailor(
    adapter: Path,
    out: Path,
    *,
    data_path: Annotated[str, "training JSON the calibration samples are drawn from"],
    image_folder: Annotated[str, "folder its `image` paths start from"],
    keep: Annotated[float, "fraction of fine-tuned entries kept"] = 0.1,
    samples: Annotated[int, "calibration samples"] = 128,
    no_compensation: Annotated[bool, "leave kept entries as they are"] = False,
    seed: Annotated[int, "of the choice of samples"] = 42,
    base: Base = None,
) -> None:
    """The fine-tuned entries that matter, compensated -> a merged model.

    In the LLM's adapted matrices; the connector is taken over as it is trained. Runs on the GPU if there is one, else
    on the CPU in float32. edit.json has, per matrix, the fraction `kept`, `error` and `plain_error` (`Tailored`).

    Args:
        keep: of each matrix, in (0, 1].
        samples: drawn with `seed`; all if there are fewer.
        no_compensation: kept entries do not make up for restored ones.

    Raises:
        UserError: not an adapter of a LLaVA, or of another base, bad settings or data, `out` not empty or not writable.
    """
    check_settings("model_tailor", keep=keep, samples=samples)
    check_new(out)
    checkpoint, updates, connector = open_adapter(adapter, base)
    validate_dataset(data_path, image_folder)
    dataset = LlavaDataset(
        data_path,
        image_folder,
        LlavaTokenizer.from_dir(checkpoint.path),
        ImagePreprocessor.from_dir(checkpoint.path),
        int(read_run(adapter).get("config", {}).get("model_max_length", _MODEL_MAX_LENGTH)),
        checkpoint.image_tokens,
    )
    chosen = random.Random(seed).sample(range(len(dataset)), min(samples, len(dataset)))
    model = _load(adapter, checkpoint)
    weights = {_name(pair.name): pair.weight() for pair in lora_pairs(model)}
    layers: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name, result in _tailored(
            model, weights, _calibration(dataset, chosen, checkpoint), updates, keep, not no_compensation
        ):
            weights[name].data.copy_(result.weight)
            layers[name] = {
                "kept": int(result.kept.count_nonzero()) / result.kept.numel(),
                "error": result.error,
                "plain_error": result.plain_error,
            }
            print(_line(name, result), flush=True)

    def change(name: str, weight: torch.Tensor) -> torch.Tensor | None:
        if name not in layers:
            return updates[name].apply(weight) if name in updates else connector.get(name)
        edited = weights[name].detach().cpu()
        # Restored entries are the checkpoint's own, whatever the precision the model ran in.
        return torch.where(edited == weight.to(edited.dtype), weight, edited.to(weight.dtype))

    settings = {
        "keep": keep,
        "samples": len(chosen),
        "seed": seed,
        "compensation": not no_compensation,
        "data_path": data_path,
    }

    def finish(folder: Path) -> None:
        write_record(folder, adapter, "model_tailor", settings, layers=layers)

    rewrite_checkpoint(checkpoint, out, change, finish=finish)


def _load(adapter: Path, checkpoint: BaseCheckpoint) -> nn.Module:
    dtype = torch.float32
    if torch.cuda.is_available():
        dtype = getattr(torch, str(checkpoint.config.get("dtype", checkpoint.config.get("torch_dtype", "float16"))))
    model = load_base(checkpoint, dtype, device=local_device())
    return load_adapter(model, read_adapter(adapter), checkpoint).eval()


def _name(module: str) -> str:
    return f"{module.removeprefix('base_model.model.')}.weight"


def _calibration(
    dataset: LlavaDataset, chosen: list[int], checkpoint: BaseCheckpoint
) -> Iterator[dict[str, torch.Tensor]]:
    """Each sample, prompt and answer, as the model's inputs: a batch of one, without padding."""
    image = [checkpoint.image_token_id] * checkpoint.image_tokens
    for index in chosen:
        sample = dataset[index]
        ids = sample["input_ids"].tolist()
        inputs = {"input_ids": torch.tensor([expand_image(ids, image, ids)])}
        if sample["pixel_values"] is not None:
            inputs["pixel_values"] = sample["pixel_values"].unsqueeze(0)
        yield inputs


class _Reached(Exception):
    """The first decoder layer has its inputs: the rest of the forward pass is not needed."""


def _tailored(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    samples: Iterator[dict[str, torch.Tensor]],
    updates: dict[str, WeightUpdate],
    keep: float,
    compensate: bool,
) -> Iterator[tuple[str, Tailored]]:
    """(name, result) of every adapted matrix of the LLM; each layer has run for the last time by then."""
    decoder: Any = model.get_submodule(f"base_model.model.{LANGUAGE}layers")
    device = next(model.parameters()).device
    states, options = _first_inputs(model, decoder[0], samples, device)
    for number, layer in enumerate(counted(decoder, "layers", len(decoder))):
        hessians = [InputHessian() for _ in _INPUTS]
        with ExitStack() as hooks:
            for hessian, modules in zip(hessians, _INPUTS, strict=True):
                handle = layer.get_submodule(modules[0]).register_forward_pre_hook(_adder(hessian))
                hooks.callback(handle.remove)
            for index, (state, option) in enumerate(zip(states, options, strict=True)):
                states[index] = layer(state.to(device), **option).cpu()
        for hessian, modules in zip(hessians, _INPUTS, strict=True):
            value = hessian.value()
            for module in modules:
                name = f"{LANGUAGE}layers.{number}.{module}.weight"
                w_pre = weights[name]
                w_ft = _on(updates[name], device).apply(w_pre)
                try:
                    yield name, tailor(w_pre.float(), w_ft, value, keep, compensate=compensate)
                except ValueError as error:
                    raise UserError(f"{name}: {error}") from error


def _first_inputs(
    model: nn.Module, first: nn.Module, samples: Iterator[dict[str, torch.Tensor]], device: torch.device
) -> tuple[list[torch.Tensor], list[dict[str, Any]]]:
    """Per sample the hidden states before the first decoder layer, on the CPU, and the layer's other arguments."""
    states: list[torch.Tensor] = []
    options: list[dict[str, Any]] = []

    def stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0].cpu())
        options.append(kwargs)
        raise _Reached

    dtype = next(model.parameters()).dtype
    handle = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        for inputs in samples:
            moved = {k: v.to(device, dtype) if v.is_floating_point() else v.to(device) for k, v in inputs.items()}
            try:
                model(**moved, use_cache=False)
            except _Reached:
                continue
    finally:
        handle.remove()
    return states, options


def _adder(hessian: InputHessian) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    return lambda module, args: hessian.add(args[0])


def _on(update: WeightUpdate, device: torch.device) -> WeightUpdate:
    magnitude = None if update.magnitude is None else update.magnitude.to(device)
    return WeightUpdate(update.lora_A.to(device), update.lora_B.to(device), update.scaling, magnitude)


def _line(name: str, result: Tailored) -> str:
    short = name.removeprefix(LANGUAGE).removesuffix(".weight")
    less = 1 - result.error / result.plain_error if result.plain_error else 0.0
    return f"{short:<28} output error {result.plain_error:.3e} -> {result.error:.3e} ({less:.1%} less)"
