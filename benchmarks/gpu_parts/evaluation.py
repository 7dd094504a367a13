"""Questions per second at short answers (8 tokens), and how often a choice of a token is a near-tie.

With random weights an answer does not end: every one has 8 tokens, and ties say nothing; so the ties are counted with
the tiny model, which is trained, in the formats of a card. Baseline: `model.generate` on the same questions, left
padded. Aim: 40 questions/s on an H100.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from gpu_parts.world import TINY, World, forget, peak_gib, spread
from llava_sculpt.data.collator import left_pad
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.evaluation.generate import generate_answers
from llava_sculpt.model.checkpoint import find_base_checkpoint
from llava_sculpt.model.greedy import greedy_config
from llava_sculpt.model.load import load_base

NEW_TOKENS = 8
TIE_TEXT = "What is in the picture?"
TEXT = "What is the colour of the thing on the left? Answer the question using a single word or phrase."


def cases(world: World) -> Iterator[dict[str, Any]]:
    yield from speed(world)
    forget(world.device)
    yield from ties(world)


def speed(world: World) -> Iterator[dict[str, Any]]:
    path = world.checkpoint.path
    tokenizer, preprocessor = LlavaTokenizer.from_dir(path), ImagePreprocessor.from_dir(path)
    questions = [{"text": TEXT, "image": name} for name in world.pictures]
    model = world.random_model()
    with torch.no_grad():  # a few tokens stand out, as a trained model's do: otherwise every second one would be a tie
        model.lm_head.weight[300:332].mul_(20)
    few = 1 if world.tiny else 4

    def ours(batch: int, asked: list[dict[str, Any]]) -> None:
        for _ in generate_answers(model, tokenizer, preprocessor, asked, world.images, batch, NEW_TOKENS):
            pass

    baseline = partial(generate, world, model, tokenizer, preprocessor)
    for batch in (1, 16):
        yield from timed(world, f"model.generate, batch {batch}", questions[: few * batch], partial(baseline, batch))
    for batch in (16, 64):
        yield from timed(world, f"ours, batch {batch}", questions, partial(ours, batch))


def timed(
    world: World, name: str, asked: list[dict[str, Any]], call: Callable[[list[dict[str, Any]]], object]
) -> Iterator[dict[str, Any]]:
    row: dict[str, Any] = {"table": "Questions per second", "case": name}
    rates = []
    try:
        call(asked[: max(1, len(asked) // 8)])
        forget(world.device)
        for _ in range(3):
            start = time.perf_counter()
            call(asked)
            rates.append(len(asked) / (time.perf_counter() - start))
    except torch.OutOfMemoryError:
        yield row | {"error": "out of memory"}
        return
    memory = {"GiB in use": peak_gib(world.device)} if world.device.type == "cuda" else {}
    yield row | {"questions": len(asked), "questions/s": spread(rates), **memory}


@torch.inference_mode()
def generate(
    world: World, model: Any, tokenizer: LlavaTokenizer, preprocessor: ImagePreprocessor, size: int, asked: Any
) -> list[list[int]]:
    """Tokens of greedy answers by transformers."""
    config, answers = greedy_config(model.config, tokenizer, NEW_TOKENS), []
    weight = model.get_input_embeddings().weight
    for start in range(0, len(asked), size):
        batch = asked[start : start + size]
        prompts = [encode_prompt(question["text"], tokenizer, has_image=True) for question in batch]
        tokens = (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2
        inputs: Any = left_pad(prompts, config.pad_token_id, model.config.image_token_id, tokens)
        pixels = [preprocessor(load_rgb(world.images / question["image"])) for question in batch]
        inputs["pixel_values"] = torch.stack(pixels).to(weight.dtype)
        inputs = {name: value.to(weight.device) for name, value in inputs.items()}
        output = model.generate(**inputs, generation_config=config)
        answers += output[:, inputs["input_ids"].shape[1] :].tolist()
    return answers


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
