"""Questions per second at short answers, and how often a choice of a token is a near-tie.

Random fp16 weights, answers of 4 tokens (short) and 16 (caption), in the batches that evaluation chooses by the free
memory, beside one by one: batch 1, `model.generate`, as LLaVA's own loader. Ties are counted with the tiny model, which
is trained. Aim: 40 short answers/s on an H100.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from evaluation import random_cases

from gpu_parts.world import TINY, World, forget
from llava_sculpt.data.collator import left_pad
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.greedy import greedy_config
from llava_sculpt.model.load import load_base

TIE_TEXT = "What is in the picture?"


def cases(world: World) -> Iterator[dict[str, Any]]:
    for found in random_cases(*(("tiny", None, 8, 1) if world.tiny else ("7b", None, 128, 3))):
        rate = {"median": found["per_s"], "low": found["per_s_min"], "high": found["per_s_max"]}
        yield {
            "table": "Questions per second",
            "case": f"{found['case']}, {found['new_tokens']} tokens, {found['dtype']}",
            "questions": found["questions"],
            "batch": found["batch_size"],
            "questions/s": rate,
            "one by one": found["one_by_one_per_s"],
            "x one by one": found["ratio"],
            **({"GiB in use": found["peak_gib"]} if found["peak_gib"] else {}),
        }
    forget(world.device)
    yield from ties(world)


def ties(world: World) -> Iterator[dict[str, Any]]:
    """How often the two best tokens of the trained tiny model are within the rounding of a 16-bit logit."""
    checkpoint = find_base_checkpoint(str(TINY))
    tokenizer, preprocessor = LlavaTokenizer.from_dir(TINY), ImagePreprocessor.from_dir(TINY)
    for dtype, tie in ((torch.float32, 1e-3), (torch.float16, 0.0625), (torch.bfloat16, 0.25)):
        model: Any = load_base(checkpoint, dtype).to(world.device)
        model.eval()
        margins: list[float] = []
        for name in world.pictures:
            prompt = encode_prompt(TIE_TEXT, tokenizer, has_image=True)
            inputs: Any = left_pad(
                [prompt], checkpoint.pad_token_id, checkpoint.image_token_id, checkpoint.image_tokens
            )
            inputs["pixel_values"] = preprocessor(load_rgb(world.images / name))[None].to(dtype)
            config = greedy_config(model.config, tokenizer, 16)
            inputs = {name: value.to(world.device) for name, value in inputs.items()}
            with torch.inference_mode():
                output = model.generate(
                    **inputs, generation_config=config, output_logits=True, return_dict_in_generate=True
                )
            for logits in output.logits:
                best = logits[0, : tokenizer.vocab_size].float().topk(2).values
                margins.append(float(best[0] - best[1]))
        close = sum(margin <= tie for margin in margins)
        yield {
            "table": "Near-ties, tiny model",
            "case": str(dtype).removeprefix("torch."),
            "closer than": tie,
            "tokens": len(margins),
            "share": close / len(margins),
        }
