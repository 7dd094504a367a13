"""Pretraining of the tiny CLIP tower: it learns to name what each patch shows, then it is frozen."""

from __future__ import annotations

import io
import time

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional
from transformers import CLIPVisionModel

from llava_sculpt.tiny.pretraining.learning_rate import cosine
from llava_sculpt.tiny.scenes import GRID, PATCH_CLASSES, PATCH_COLOURS, Scene, encoded, patch_tags

BATCH = 64
PEAK_LR = 1.5e-3
# LLaVA reads the last layer but one (vision_feature_layer -2), so that is the one to train.
FEATURE_LAYER = -2


def pictures_and_tags(scenes: list[Scene]) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 48, 48, 3], as read back from the JPEG files, and int64 tags [N, 36, 2]."""
    pictures = np.stack([np.asarray(Image.open(io.BytesIO(encoded(scene)))) for scene in scenes])
    return pictures, np.stack([patch_tags(scene) for scene in scenes])


def normalise(pictures: np.ndarray, mean: list[float], std: list[float]) -> torch.Tensor:
    """CLIP's normalisation of uint8 [N, H, W, 3] to float32 [N, 3, H, W]; the pictures need no resizing."""
    scaled = torch.from_numpy(pictures).float().div(255)
    return ((scaled - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2).contiguous()


def patch_features(tower: CLIPVisionModel, pixels: torch.Tensor) -> torch.Tensor:
    """What LLaVA takes from the tower: [N, 3, H, W] -> [N, 36, d], without the class token."""
    states = tower(pixels, output_hidden_states=True).hidden_states
    features: torch.Tensor = states[FEATURE_LAYER][:, 1:]
    return features


def train_tower(
    tower: CLIPVisionModel, pixels: torch.Tensor, tags: torch.Tensor, steps: int, seed: int
) -> dict[str, float]:
    """Train on per-patch class, colour, row and column; returns the accuracies of the last 50 steps."""
    generator = torch.Generator().manual_seed(seed)
    head = nn.Linear(tower.config.hidden_size, len(PATCH_CLASSES) + len(PATCH_COLOURS) + 2 * GRID)
    sizes = [len(PATCH_CLASSES), len(PATCH_COLOURS), GRID, GRID]
    place = torch.arange(GRID * GRID)
    rows_columns = torch.stack([place // GRID, place % GRID], 1)
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, weight_decay=0.01, betas=(0.9, 0.98))
    names = ("class", "colour", "row", "column")
    recent: list[list[float]] = []
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * cosine(step, steps)
        chosen = torch.randint(len(pixels), (BATCH,), generator=generator)
        logits = head(patch_features(tower, pixels[chosen])).flatten(0, 1).split(sizes, 1)
        target = torch.cat([tags[chosen], rows_columns.expand(BATCH, -1, -1)], 2).flatten(0, 1)
        losses = [functional.cross_entropy(part, target[:, i]) for i, part in enumerate(logits)]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        shown = target[:, 0] > 0  # accuracy where there is something to see
        recent.append([(p[shown].argmax(1) == target[shown, i]).float().mean().item() for i, p in enumerate(logits)])
        if (step + 1) % 100 == 0 or step + 1 == steps:
            means = np.mean(recent[-50:], 0)
            text = "  ".join(f"{name} {value:.3f}" for name, value in zip(names, means, strict=True))
            print(f"tower {step + 1}/{steps}  {text}  {time.monotonic() - started:.0f} s", flush=True)
    return {name: round(float(value), 4) for name, value in zip(names, np.mean(recent[-50:], 0), strict=True)}
