"""Answers of a LLaVA model to many questions, as they come."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from llava_sculpt.data.conversation import encode_prompt
from llava_sculpt.data.images import ImagePreprocessor, load_rgb
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.batch_size import batch_that_fits, free_bytes
from llava_sculpt.evaluation.decode import Decoder, Prompt

_IMAGE_THREADS = 4
_CPU_BATCH = 16


def generate_answers(
    model: nn.Module,
    tokenizer: LlavaTokenizer,
    preprocessor: ImagePreprocessor,
    questions: Sequence[Mapping[str, Any]],
    image_folder: Path,
    batch_size: int | None = None,
    max_new_tokens: int = 128,
    exact: bool = False,
) -> Iterator[dict[int, str]]:
    """The model's stripped answers, by place in `questions`, batch by batch; every place comes once.

    A question has "text" (without "<image>"); if it is about an image, "image": a file relative to `image_folder`, or
    the image itself, in RGB; and if it ends a conversation, "rounds": (question, answer) of what was said before.
    `model` is a LlavaForConditionalGeneration or a PeftModel around one; it is used as it is (device, dtype) but in
    eval mode. In float32, and with `exact` in 16 bits, an answer is what `model.generate` says greedily to the question
    alone, whatever else is asked and whatever the batch size; otherwise up to near-ties (`evaluation/decode.py`). Each
    image is read once, if the questions about it fit into one batch.

    `batch_size` is by default 16 on a CPU, on a GPU what its free memory allows. Where memory runs out all the same, a
    line on stderr says so and half as many questions go on together.

    Raises:
        UserError: an image that cannot be read, or no memory for a single question.
    """
    given: dict[str, Image.Image] = {}  # images that are no files, under names that no file has
    numbers: dict[int, int] = {}

    def name_of(image: Any) -> str | None:
        if not isinstance(image, Image.Image):
            return image
        name = f"\0{numbers.setdefault(id(image), len(numbers))}"
        given[name] = image
        return name

    prompts = [
        Prompt.of(i, encode_prompt(q["text"], tokenizer, "image" in q, q.get("rounds", ())), name_of(q.get("image")))
        for i, q in enumerate(questions)
    ]
    decoder = Decoder(model, tokenizer, max_new_tokens, exact)
    size = batch_size or _CPU_BATCH
    if batch_size is None and prompts and decoder.device.type == "cuda":
        longest = max(len(prompt.head) + prompt.length for prompt in prompts) + decoder.image_tokens + max_new_tokens
        size = batch_that_fits(decoder.llava.config, decoder.dtype, longest, free_bytes(decoder.device))
    was_training = model.training
    model.eval()

    def load(batch: Sequence[Prompt]) -> dict[str, torch.Tensor]:
        names = list(dict.fromkeys(prompt.image for prompt in batch if prompt.image is not None))
        pixels = image_pool.map(lambda name: preprocessor(given.get(name) or load_rgb(image_folder / name)), names)
        return dict(zip(names, pixels, strict=True))

    try:
        with ThreadPoolExecutor(_IMAGE_THREADS) as image_pool, ThreadPoolExecutor(1) as ahead:
            while prompts:
                batches = _batches(prompts, size)
                prompts = []
                # While the model answers one batch, the images of the next are read.
                waiting = ahead.submit(load, batches[0])
                for number, batch in enumerate(batches):
                    images = waiting.result()
                    if number + 1 < len(batches):
                        waiting = ahead.submit(load, batches[number + 1])
                    said = [len(prompt.said) for prompt in batch]
                    put_off: list[Prompt] | None = None
                    try:
                        with torch.inference_mode():
                            answers, put_off = decoder.answer(batch, images, may_put_off=len(batches) > 1)
                    except torch.OutOfMemoryError:
                        pass  # on below, where the failed call's tensors are gone
                    if put_off is None:
                        size = _halved(len(batch))
                        for prompt, before in zip(batch, said, strict=True):
                            del prompt.said[before:]
                        prompts += [prompt for rest in batches[number:] for prompt in rest]
                        break
                    prompts += put_off
                    yield answers
    finally:
        model.train(was_training)


def _halved(size: int) -> int:
    """Half of a batch size with which memory ran out, said in a line.

    Raises:
        UserError: there is no half.
    """
    if size == 1:
        raise UserError("out of memory with a single question: nothing smaller is left to try")
    torch.cuda.empty_cache()
    print(f"out of memory with {size} questions at a time: going on with {size // 2}", file=sys.stderr, flush=True)
    return size // 2


def _batches(prompts: Sequence[Prompt], size: int) -> list[list[Prompt]]:
    """Batches with and without images: questions about one image together, otherwise of similar length.

    The longest first: a batch that does not fit into memory fails at once.
    """
    longest: dict[str | None, int] = {}
    for prompt in prompts:
        longest[prompt.image] = max(longest.get(prompt.image, 0), prompt.length)
    batches = []
    for with_image in (True, False):
        order = [prompt for prompt in prompts if (prompt.image is not None) == with_image]
        order.sort(key=lambda p: (-longest[p.image], p.image or "", -p.length, p.index))
        batches += [order[start : start + size] for start in range(0, len(order), size)]
    return batches
