"""Checkpoints of the original LLaVA package (liuhaotian/llava-v1.5-7b, -13b) written in Hugging Face layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from llava_sculpt.artifacts.writing import copy_files, in_shards, write_folder
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.model.base_config import check_llava_config
from llava_sculpt.model.checkpoint import TOWER_FOLDER, find_folder, read_config
from llava_sculpt.model.expected import expected_shapes, key_problems
from llava_sculpt.model.layout import (
    EMBEDDING,
    HEAD,
    TOWER,
    disk_name,
    hf_config,
    is_buffer,
    is_original,
    is_tied,
    name_of_original,
)
from llava_sculpt.model.processor import write_processor
from llava_sculpt.model.shards import (
    Stored,
    check_shards,
    files_fingerprint,
    stored_tensors,
    tower_tensors,
    weight_files,
)
from llava_sculpt.records import write_json

ROWS_FILE = "hf_rows.safetensors"  # what `convert --to original` keeps of <image> and <pad>, unread by the original


def find_tower(original: Path, named: str) -> Path:
    """Folder of the CLIP model that `mm_vision_tower` names: that folder, `vision_tower/` of the checkpoint, the Hub.

    Raises:
        UserError: none of these.
    """
    for folder in (Path(named), original / TOWER_FOLDER):
        if os.path.isfile(folder / "config.json"):
            return folder
    small = ["config.json", "preprocessor_config.json"]
    try:
        folder = find_folder(named, [*small, "model*.safetensors"])
        return folder if weight_files(folder) else find_folder(named, [*small, "pytorch_model*.bin*"])
    except UserError as error:
        raise UserError(
            f"{original / 'config.json'}: mm_vision_tower: {error}; or put the CLIP model's "
            f"folder into {original / TOWER_FOLDER}"
        ) from error


def conversion_identity(source: Path, tower: Path) -> str:
    """Another one for other weights or another configuration of the checkpoint or its tower."""
    small = [source / "config.json", tower / "config.json"]
    rows = [source / ROWS_FILE] if (source / ROWS_FILE).is_file() else []
    return files_fingerprint(small, [*weight_files(source), *weight_files(tower), *rows])


def convert_to_hf(source: Path, out: Path) -> None:
    """Write an original checkpoint in Hugging Face layout, one tensor in memory; a killed one continues.

    `<image>` = V and `<pad>` = V + 1 get rows in the embedding and lm_head, filled up to a multiple of 64: those that
    `convert_to_original` has kept beside the weights, else each the mean of the real rows (whose logit never exceeds
    the largest real one). Every other weight keeps its bits.

    Raises:
        UserError: everything that is wrong with the checkpoint, before anything is written; as `write_folder`.
    """
    original = read_config(source)
    if not is_original(original):
        raise UserError(f"{source}: not a checkpoint of the original LLaVA package (no mm_vision_tower in config.json)")
    tower = find_tower(source, original["mm_vision_tower"])
    problems = check_shards(source) + check_shards(tower)
    for folder, name in ((source, "tokenizer.model"), (tower, "preprocessor_config.json")):
        if not (folder / name).is_file():
            problems.append(f"{folder}: {name} is missing")
    if problems:
        raise UserError(problems)
    config = hf_config(original, read_config(tower))
    check_llava_config(config, source / "config.json")
    pieces = LlavaTokenizer.from_dir(source).vocab_size
    if pieces != original["vocab_size"]:
        raise UserError(
            f"{source}: tokenizer.model has {pieces} pieces, config.json vocab_size {original['vocab_size']}"
        )
    own_tower = bool(original.get("unfreeze_mm_vision_tower"))
    rows = original["vocab_size"]
    expected = expected_shapes(config)
    expected |= {name: (rows, *expected[name][1:]) for name in (EMBEDDING, HEAD) if name in expected}

    # A tower in the checkpoint is a 16-bit copy that the original overwrites, unless it was trained; lm_head is a copy
    # of a tied embedding.
    copies = (() if own_tower else (TOWER,)) + ((HEAD,) if is_tied(config) else ())
    found = [tensor for tensor in _renamed(source) if not tensor.name.startswith(copies)]
    if not own_tower:
        found += tower_tensors(tower)
    names = [tensor.name for tensor in found]
    problems = [f"{source}: weight {name} is there twice" for name in sorted({n for n in names if names.count(n) > 1})]
    problems += key_problems({tensor.name: tensor.shape for tensor in found}, expected, source)
    if problems:
        raise UserError(problems)

    rows_file = source / ROWS_FILE
    kept = {tensor.name: tensor for tensor in stored_tensors(rows_file)} if rows_file.is_file() else {}
    full = config["text_config"]["vocab_size"]
    weights = [_with_rows(t, full, kept.get(t.name)) if t.name in (EMBEDDING, HEAD) else t for t in found]
    files = in_shards([Stored(disk_name(t.name), t.shape, t.dtype, t.load) for t in weights])

    def finish(folder: Path) -> None:
        copy_files(source, folder, ["tokenizer.model"])
        copy_files(tower, folder, ["preprocessor_config.json"])
        write_json(folder / "config.json", config)
        write_processor(folder, config)

    write_folder(
        out, files, finish, resume={"source": conversion_identity(source, tower), "to": "hf", "files": sorted(files)}
    )


def _renamed(source: Path) -> Iterator[Stored]:
    for file in weight_files(source):
        for tensor in stored_tensors(file):
            if not is_buffer(tensor.name):
                yield Stored(name_of_original(tensor.name), tensor.shape, tensor.dtype, tensor.load)


def _with_rows(tensor: Stored, rows: int, kept: Stored | None) -> Stored:
    """The same matrix with rows appended up to `rows`."""
    added = (rows - tensor.shape[0], *tensor.shape[1:])

    def load() -> torch.Tensor:
        weight = tensor.load()
        if kept is not None and kept.shape == added and kept.dtype == tensor.dtype:
            return torch.cat([weight, kept.load()])
        mean = weight.float().mean(dim=0).to(weight.dtype)
        return torch.cat([weight, mean.expand(added)])

    return Stored(tensor.name, (rows, *tensor.shape[1:]), tensor.dtype, load)
