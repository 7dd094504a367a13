"""Whether the weight files of a LLaVA base are those of its config.json: by their headers, before they are loaded."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from llava_sculpt.errors import UserError, first_line
from llava_sculpt.model.base_config import known_config
from llava_sculpt.model.layout import EMBEDDING, HEAD, is_buffer, is_tied, memory_name
from llava_sculpt.model.shards import INDEX_FILE, PICKLED_INDEX, read_index, stored_tensors, weight_files

Shapes = dict[str, tuple[int, ...]]


def expected_shapes(config: dict[str, Any]) -> Shapes:
    """Shape of every weight of the model a Hugging Face config.json describes, by in-memory name; none twice.

    Builds the model without its values (0.3 s for LLaVA-1.5-7B), once per process and config.json.

    Raises:
        UserError: transformers cannot build such a model.
    """
    return dict(_shapes(json.dumps(known_config(config), sort_keys=True)))


@lru_cache(maxsize=8)
def _shapes(config: str) -> Shapes:
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    from transformers.modeling_utils import set_zero3_state

    try:
        # In a run under ZeRO-3 transformers would cut up this model too, which has no values.
        with set_zero3_state(), torch.device("meta"):
            model = LlavaForConditionalGeneration(LlavaConfig.from_dict(json.loads(config)))
    # Whatever transformers raises at settings that do not go together.
    except Exception as error:
        raise UserError(f"config.json: transformers cannot build this model: {first_line(error)}") from error
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    if is_tied(json.loads(config)):
        shapes.pop(HEAD, None)
    return shapes


def key_problems(found: Shapes, expected: Shapes, source: Path) -> list[str]:
    """Every missing and unexpected weight and every wrong shape, by in-memory name."""
    problems = [f"{source}: weight {name} is missing" for name in sorted(expected.keys() - found.keys())]
    problems += [f"{source}: unexpected weight {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"{source}: weight {name} is {list(found[name])}, config.json says {list(expected[name])}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    return problems


def weight_problems(folder: Path, config: dict[str, Any]) -> list[str]:
    """What is wrong with the weights of a LLaVA in Hugging Face layout: [] if each is there once, in its shape.

    Constants that older versions of transformers saved are allowed, and lm_head beside a tied embedding.
    """
    files = weight_files(folder)
    found: Shapes = {}
    places: dict[str, str] = {}
    problems = []
    for file in files:
        for tensor in stored_tensors(file):
            places[tensor.name] = file.name
            name = memory_name(tensor.name)
            if is_buffer(name) or (name == HEAD and is_tied(config)):
                continue
            if name in found:
                problems.append(f"{folder}: weight {name} is there twice")
            if not tensor.dtype.is_floating_point:
                problems.append(f"{file}: {tensor.name} is of type {tensor.dtype}")
            found[name] = tensor.shape
    # transformers loads what the index names, and nothing else.
    alone = {"model.safetensors", "pytorch_model.bin"} & {file.name for file in files}
    index = folder / (PICKLED_INDEX if files and files[0].suffix == ".bin" else INDEX_FILE)
    if len(files) > 1 and alone:
        problems.append(f"{folder}: {', '.join(alone)} and {len(files) - 1} other weight files: which are the weights?")
    elif not alone and read_index(index) != places:
        problems.append(f"{index}: does not say which weight is in which file; download it again")
    try:
        expected = expected_shapes(config)
    except UserError as error:
        return [*problems, *(f"{folder / problem}" for problem in error.problems)]
    problems += key_problems(found, expected, folder)
    rows = expected[EMBEDDING][0]
    for key in ("image_token_id", "image_token_index", "pad_token_id"):
        if (config.get(key) or 0) >= rows:
            problems.append(f"{folder / 'config.json'}: {key} is {config[key]}, the embedding has {rows} rows")
    return problems
