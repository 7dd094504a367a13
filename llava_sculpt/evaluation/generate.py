"""Answers of a LLaVA model to many questions: greedy, in left-padded batches, with the key-value cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from llava_sculpt.data.collator import left_pad
from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer

_IMAGE_THREADS = 4


@torch.inference_mode()
def generate_answers(
    model: nn.Module,
    tokenizer: LlavaTokenizer,
    preprocessor: ImagePreprocessor,
    questions: Sequence[Mapping[str, Any]],
    image_folder: Path,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    progress: str | None = None,
) -> list[str]:
    """The model's answer to every question, stripped, in the order of `questions`.

    A question has "text" (without "<image>") and, if it is about an image, "image" (relative to
    `image_folder`). `model` is a LlavaForConditionalGeneration or a PeftModel around one; it is used as it is
    (device, dtype) but in eval mode. Batches hold questions of similar length, so the answers do not depend
    on the batch size beyond floating-point noise in ties. `progress` names a progress bar; None shows none.
    Raises UserError for an image that cannot be read.
    """
    prompts = [encode_prompt(q["text"], tokenizer, has_image="image" in q) for q in questions]
    # The longest first: a batch that does not fit into memory fails at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    answers = [""] * len(questions)
    embedding = model.get_input_embeddings().weight  # type: ignore[operator]
    config: Any = model.config
    generation = _greedy(config, tokenizer, max_new_tokens)
    image_tokens = image_token_count(config)
    was_training = model.training
    model.eval()

    def load(batch: Sequence[int]) -> list[torch.Tensor]:
        paths = [image_folder / questions[i]["image"] for i in batch if "image" in questions[i]]
        return list(image_pool.map(lambda path: preprocessor(load_rgb(path)), paths))

    try:
        with (
            ThreadPoolExecutor(_IMAGE_THREADS) as image_pool,
            ThreadPoolExecutor(1) as ahead,
            tqdm(total=len(questions), desc=progress, disable=progress is None, unit="q") as bar,
        ):
            # While the model answers one batch, the images of the next are read.
            waiting = ahead.submit(load, batches[0]) if batches else None
            for number, batch in enumerate(batches):
                pixels = waiting.result() if waiting else []
                waiting = ahead.submit(load, batches[number + 1]) if number + 1 < len(batches) else None
                inputs = left_pad(
                    [prompts[i] for i in batch],
                    generation.pad_token_id,
                    config.image_token_id,
                    image_tokens,
                )
                if pixels:
                    inputs["pixel_values"] = torch.stack(pixels).to(embedding.dtype)
                inputs = {name: value.to(embedding.device) for name, value in inputs.items()}
                width = inputs["input_ids"].shape[1]
                output = model.generate(**inputs, generation_config=generation)  # type: ignore[operator]
                for i, ids in zip(batch, output[:, width:].tolist(), strict=True):
                    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
                    answers[i] = tokenizer.decode(ids[:end]).strip()
                bar.update(len(batch))
    finally:
        model.train(was_training)
    return answers


def image_token_count(config: Any) -> int:
    """How many tokens one image takes: the tower's patches (the class token is dropped)."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def _greedy(config: Any, tokenizer: LlavaTokenizer, max_new_tokens: int) -> GenerationConfig:
    """Plain greedy decoding.

    Every setting that could change the choice of a token is given, because generate() fills what is left out
    from the checkpoint's generation_config.json (LLaVA-1.5's asks for sampling). The rows behind the
    tokenizer's vocabulary (image mark, padding) exist only in this port of LLaVA and are never answers.
    """
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.vocab_size + 1,
        suppress_tokens=list(range(tokenizer.vocab_size, config.text_config.vocab_size)),
    )
