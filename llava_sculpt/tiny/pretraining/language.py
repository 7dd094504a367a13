"""Pretraining of the tiny connector and LLM on the Source tasks, with the tower frozen."""

from __future__ import annotations

import time
from collections import defaultdict
from random import Random

import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from llava_sculpt.data.conversation import IGNORE_INDEX
from llava_sculpt.tiny.pretraining.grounding import AttentionTaps
from llava_sculpt.tiny.pretraining.learning_rate import cosine
from llava_sculpt.tiny.pretraining.packing import Batch, Packer
from llava_sculpt.tiny.sources import QA

BATCH = 16  # pictures
QUESTIONS = 6  # about each of them, at most
PEAK_LR = 2e-3
POINTING_WEIGHT = 0.5


def answer_logits(
    model: LlavaForConditionalGeneration, features: torch.Tensor, batch: Batch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [k, V] and gold ids [k] of the k supervised tokens, and their (row, column) in
    `batch.ids`, int64 [k, 2].

    `features`: what the frozen tower gives, float32 [B, image tokens, d_tower].
    """
    inner = model.model
    embed = inner.get_input_embeddings()
    before = embed(batch.before).expand(len(features), -1, -1)
    inputs = torch.cat([before, inner.multi_modal_projector(features), embed(batch.ids)], 1)
    states = inner.language_model(
        inputs_embeds=inputs, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
    ).last_hidden_state
    at = (batch.labels != IGNORE_INDEX).nonzero()
    offset = inputs.shape[1] - batch.ids.shape[1] - 1  # the token before predicts
    return model.lm_head(states[at[:, 0], at[:, 1] + offset]), batch.labels[at[:, 0], at[:, 1]], at


def train_language(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    features: torch.Tensor,
    questions: list[list[QA]],
    steps: int,
    seed: int,
) -> None:
    """Train connector and LLM in place. `features[i]` belongs to `questions[i]`."""
    rng = Random(f"{seed}/language")
    trained = [p for name, p in model.named_parameters() if "vision_tower" not in name]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR, weight_decay=0.05, betas=(0.9, 0.98))
    taps = AttentionTaps(model.model.language_model)
    order: list[int] = []
    running: list[tuple[float, ...]] = []
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LR * cosine(step, steps)
        if len(order) < BATCH:
            order = rng.sample(range(len(questions)), len(questions))
        chosen, order = order[:BATCH], order[BATCH:]
        rows = [rng.sample(questions[i], min(QUESTIONS, len(questions[i]))) for i in chosen]
        batch = packer.pack(rows)
        logits, gold, _ = answer_logits(model, features[chosen], batch)
        pointing = taps.loss(batch)
        loss = functional.cross_entropy(logits, gold) + POINTING_WEIGHT * pointing
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        running.append((loss.item(), pointing.item(), (logits.argmax(1) == gold).float().mean().item()))
        if (step + 1) % 100 == 0 or step + 1 == steps:
            mean_loss, mean_pointing, right = (sum(values) / len(running) for values in zip(*running, strict=True))
            running.clear()
            seconds = time.monotonic() - started
            measured = f"loss {mean_loss:.3f}  pointing {mean_pointing:.3f}  tokens right {right:.3f}"
            print(f"llm {step + 1}/{steps}  {measured}  {seconds:.0f} s", flush=True)


@torch.no_grad()
def exact_match(
    model: LlavaForConditionalGeneration,
    packer: Packer,
    features: torch.Tensor,
    questions: list[list[QA]],
) -> dict[str, float]:
    """Percent of questions whose greedy answer is the gold answer: over "all" and per family.

    Greedy decoding gives the gold answer if and only if every supervised token is the most likely one after
    the gold tokens before it, so one forward pass is enough.
    """
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(questions), BATCH):
        rows = questions[start : start + BATCH]
        batch = packer.pack(rows)
        logits, gold, at = answer_logits(model, features[start : start + BATCH], batch)
        wrong = logits.argmax(1) != gold
        missed = {(int(i), int(batch.number[i, j])) for i, j in at[wrong]}
        for i, row in enumerate(rows):
            for n, question in enumerate(row, 1):
                right[question.family].append((i, n) not in missed)
                right["all"].append((i, n) not in missed)
    return {family: round(100 * sum(hits) / len(hits), 1) for family, hits in sorted(right.items())}
