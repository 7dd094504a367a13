"""Samples to batches: image tokens, truncation, padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llava_sculpt.data.conversation import IGNORE_INDEX, IMAGE_TOKEN_INDEX


@dataclass(frozen=True)
class TrainCollator:
    """Items of ``LlavaDataset`` to a right-padded training batch.

    Each ``IMAGE_TOKEN_INDEX`` becomes ``image_tokens`` times ``image_token_id`` (not trained on); then the
    sample is cut at ``model_max_length``, as LLaVA does. A batch of B samples, n tokens long, of which k have
    images: ``input_ids``, ``labels`` and ``attention_mask`` int64 [B, n], ``pixel_values`` float32 [k, 3, H, W]
    in the order of the samples. A batch without images gets one more row, a black image that is not trained on, so
    that every process runs the vision tower.

    ``logits_to_keep`` and ``shift_labels``, int64 [B, k], say where a next token is trained on and which one, so that
    the model makes logits nowhere else: most of a sample is its image. (See ``supervised_positions``.)
    """

    pad_token_id: int
    image_token_id: int
    image_tokens: int
    image_size: int
    model_max_length: int

    def __call__(self, samples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """ValueError if images and placeholders do not match, or if the cut would go through an image."""
        rows = []
        for sample in samples:
            ids, labels = sample["input_ids"].tolist(), sample["labels"].tolist()
            wide_ids = expand_image(ids, [self.image_token_id] * self.image_tokens, ids)
            wide_labels = expand_image(labels, [IGNORE_INDEX] * self.image_tokens, ids)
            images = ids.count(IMAGE_TOKEN_INDEX)
            if images != (sample["pixel_values"] is not None):
                raise ValueError(f"a sample has {images} image placeholders and not as many images")
            if self.image_token_id in wide_ids[self.model_max_length :]:
                raise ValueError(f"model_max_length {self.model_max_length} cuts through an image")
            rows.append((wide_ids[: self.model_max_length], wide_labels[: self.model_max_length]))
        pixels = [sample["pixel_values"] for sample in samples if sample["pixel_values"] is not None]
        if not pixels:
            rows.append(([self.image_token_id] * self.image_tokens, [IGNORE_INDEX] * self.image_tokens))
            pixels = [torch.zeros(3, self.image_size, self.image_size)]
        length = max(len(ids) for ids, _ in rows)
        labels = torch.tensor([labels + [IGNORE_INDEX] * (length - len(labels)) for _, labels in rows])
        positions, shifted = supervised_positions(labels)
        return {
            "input_ids": torch.tensor([ids + [self.pad_token_id] * (length - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "labels": labels,
            "logits_to_keep": positions,
            "shift_labels": shifted,
            "pixel_values": torch.stack(pixels),
        }


def supervised_positions(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where a next token is trained on, and which.

    Args:
        labels: int64 [B, n], of each token itself.

    Returns:
        Positions and the labels of the tokens behind them, int64 [B, k], k the most of any row and at least 1. Shorter
        rows are filled up with further positions of theirs whose label is ``IGNORE_INDEX``. (Positions, not a mask: to
        index with a mask the host must wait for the device.)
    """
    shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
    trained = shifted != IGNORE_INDEX
    width = max(int(trained.sum(1).max()), 1)
    positions = trained.int().argsort(dim=1, descending=True, stable=True)[:, :width]
    return positions, shifted.gather(1, positions)


def left_pad(
    prompts: Sequence[Sequence[int]], pad_token_id: int, image_token_id: int, image_tokens: int
) -> dict[str, torch.Tensor]:
    """Prompts of ``encode_prompt`` to a left-padded batch for generation.

    Returns ``input_ids`` and ``attention_mask``, int64 [len(prompts), longest], image tokens included.
    """
    image = [image_token_id] * image_tokens
    rows = [expand_image(list(prompt), image, prompt) for prompt in prompts]
    length = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([[pad_token_id] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
    }


def expand_image(values: Sequence[int], image: Sequence[int], ids: Sequence[int]) -> list[int]:
    """``values``, one per token of ``ids``, with ``image`` wherever ``ids`` has ``IMAGE_TOKEN_INDEX``."""
    wide: list[int] = []
    for value, index in zip(values, ids, strict=True):
        if index == IMAGE_TOKEN_INDEX:
            wide += image
        else:
            wide.append(value)
    return wide
