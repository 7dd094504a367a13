"""Greedy decoding of a batch of questions that gives each the answer it would get alone.

What depends on the batch is rounding: kernels add in another order for another shape. It can only change an answer
where the two best tokens are closer than the rounding error. Where decoding is exact, such a question leaves the batch
and is answered alone by `model.generate`; every other choice of a token is the same in any batch. In float32 it always
is exact; in 16 bits near-ties are so frequent (12 % of the tokens of open answers of a pretrained 135M model in
bfloat16) that it is only so when asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from transformers import DynamicCache

from llava_sculpt.data.collator import left_pad
from llava_sculpt.data.conversation import IMAGE_TOKEN_INDEX
from llava_sculpt.data.tokenizer import LlavaTokenizer
from llava_sculpt.errors import UserError
from llava_sculpt.model.greedy import greedy_config

# Two logits that are closer than this are a tie. In float32 the largest change of a margin seen between batch sizes was
# 4e-6 on the tiny model; 16-bit formats round the logits themselves, bfloat16 to multiples of 2^-3 from 16 on.
# How far apart batches are on a 7B model in 16 bits was not measured.
_TIE = {torch.float32: 1e-3, torch.float16: 0.0625, torch.bfloat16: 0.25}
# Rows that speak on while a batch is nearly empty are put off, to be finished together with those of other batches.
_PUT_OFF_AFTER = 8
_PUT_OFF_SHARE = 8


@dataclass
class Prompt:
    """An encoded question: what stands before and behind its image, and the answer's tokens so far.

    Without an image everything is in `tail`, and `image` is None; otherwise `image` names the picture.
    """

    index: int
    head: list[int]
    tail: list[int]
    image: str | None
    said: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, index: int, ids: Sequence[int], image: str | None) -> Prompt:
        """From the ids of `encode_prompt`, with IMAGE_TOKEN_INDEX once where there is an image."""
        at = ids.index(IMAGE_TOKEN_INDEX) if image is not None else -1
        return cls(index, list(ids[: max(at, 0)]), list(ids[at + 1 :]), image)

    @property
    def length(self) -> int:
        """Tokens of its own: those that no other question about the same image shares."""
        return len(self.tail) + len(self.said)


class Decoder:
    """Greedy decoding with the key-value cache of the text before the image, and of each image, computed once."""

    def __init__(self, model: nn.Module, tokenizer: LlavaTokenizer, max_new_tokens: int, exact: bool = False) -> None:
        """`model`: a LlavaForConditionalGeneration or a PeftModel around one, used as it is (device, dtype).

        `exact`: in 16 bits too no answer depends on the batch; in float32 none does anyway.
        """
        self.llava = cast(Any, model.get_base_model() if isinstance(model, PeftModel) else model)
        self.tokenizer = tokenizer
        self.max_new_tokens = max_new_tokens
        weight = self.llava.get_input_embeddings().weight
        self.device, self.dtype = weight.device, weight.dtype
        self.tie = _TIE[self.dtype] if exact or self.dtype == torch.float32 else -math.inf
        self.image_tokens = image_token_count(self.llava.config)
        self.generation = greedy_config(self.llava.config, tokenizer, max_new_tokens)
        self.heads: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def answer(
        self, batch: Sequence[Prompt], images: dict[str, torch.Tensor], may_put_off: bool
    ) -> tuple[dict[int, str], list[Prompt]]:
        """Answers by index, and the prompts that were put off (their `said` has grown).

        The prompts of a batch are all with or all without an image. `images`: float32 [3, H, W] by name.

        Raises:
            UserError: logits that are not finite.
        """
        done: dict[int, str] = {}
        alone: list[Prompt] = []
        rows = list(batch)
        cache = self._read_images(rows, images) if rows[0].image is not None else DynamicCache()
        ids, mask, positions = self._tails(rows, cache.get_seq_length())
        for step in range(self.max_new_tokens):
            output = self.llava(
                input_ids=ids,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            best = output.logits[:, -1, : self.tokenizer.vocab_size].float().topk(2)
            # In one transfer, for which a GPU waits: ids are whole numbers in float32 up to 2^24.
            margins, tokens = torch.stack([best.values[:, 0] - best.values[:, 1], best.indices[:, 0].float()]).tolist()
            check_logits(margins, self.dtype)
            ids = best.indices[:, :1]
            keep = []
            for row, (prompt, token) in enumerate(zip(rows, map(int, tokens), strict=True)):
                if margins[row] <= self.tie:
                    alone.append(prompt)
                    continue
                if token != self.tokenizer.eos_id:
                    prompt.said.append(token)
                if token == self.tokenizer.eos_id or len(prompt.said) == self.max_new_tokens:
                    done[prompt.index] = self._text(prompt.said)
                else:
                    keep.append(row)
            if len(keep) < len(rows):
                rows = [rows[row] for row in keep]
                if not rows:
                    break
                kept = torch.tensor(keep, device=self.device)
                cache.batch_select_indices(kept)
                ids, mask, positions = ids[kept], mask[kept], positions[kept]
            if may_put_off and step + 1 >= _PUT_OFF_AFTER and len(rows) * _PUT_OFF_SHARE <= len(batch):
                break
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions[:, -1:] + 1
        for prompt in alone:
            done[prompt.index] = self._answer_alone(prompt, images)
        return done, rows

    def _read_images(self, rows: Sequence[Prompt], images: dict[str, torch.Tensor]) -> DynamicCache:
        """The cache, one row per prompt, of the text before the image and the image."""
        names = list(dict.fromkeys(prompt.image for prompt in rows if prompt.image is not None))
        (head,) = {tuple(prompt.head) for prompt in rows}  # the conversation's beginning, the same for all
        if head not in self.heads:
            first: Any = DynamicCache()
            self.llava.model(input_ids=torch.tensor([head], device=self.device), past_key_values=first, use_cache=True)
            self.heads[head] = [(layer.keys, layer.values) for layer in first.layers]
        cache = DynamicCache()
        for number, (keys, values) in enumerate(self.heads[head]):
            cache.update(keys.expand(len(names), -1, -1, -1), values.expand(len(names), -1, -1, -1), number)
        ids = torch.full((len(names), self.image_tokens), self.llava.config.image_token_id, device=self.device)
        pixels = torch.stack([images[name] for name in names]).to(self.device, self.dtype)
        self.llava.model(input_ids=ids, pixel_values=pixels, past_key_values=cache, use_cache=True)
        if len(names) < len(rows):
            place = {name: number for number, name in enumerate(names)}
            cache.batch_select_indices(torch.tensor([place[p.image] for p in rows if p.image], device=self.device))
        return cache

    def _tails(self, rows: Sequence[Prompt], before: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Ids, attention mask (over the cache too) and positions of what comes behind the image, padded in front."""
        width = max(prompt.length for prompt in rows)
        ids = [[self.generation.pad_token_id] * (width - p.length) + p.tail + p.said for p in rows]
        padding = torch.tensor([[width - prompt.length] for prompt in rows], device=self.device)
        place = torch.arange(width, device=self.device)[None]
        seen = (place >= padding).long()
        mask = torch.cat([seen.new_ones(len(rows), before), seen], dim=1)
        return torch.tensor(ids, device=self.device), mask, (place - padding).clamp(min=0) + before

    def _answer_alone(self, prompt: Prompt, images: dict[str, torch.Tensor]) -> str:
        image = [IMAGE_TOKEN_INDEX] if prompt.image is not None else []
        ids = [prompt.head + image + prompt.tail]
        inputs = left_pad(ids, self.generation.pad_token_id, self.llava.config.image_token_id, self.image_tokens)
        if prompt.image is not None:
            inputs["pixel_values"] = images[prompt.image][None].to(self.dtype)
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        output = self.llava.generate(**inputs, generation_config=self.generation)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        return self._text(new[: new.index(self.tokenizer.eos_id)] if self.tokenizer.eos_id in new else new)

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens).strip()


def check_logits(values: Iterable[float], dtype: torch.dtype) -> None:
    """Refuse to choose a token by logits, or differences of them, that are not finite: any one would come first.

    Raises:
        UserError: a NaN or an infinity.
    """
    if not all(map(math.isfinite, values)):
        raise UserError(
            f"the model's logits are NaN or infinite in {dtype}: its weights or those of the adapter are damaged, or "
            "too large to compute with" + ("; bfloat16 goes further: eval --dtype bf16" * (dtype == torch.float16))
        )


def image_token_count(config: Any) -> int:
    """How many tokens one image takes: the tower's patches (the class token is dropped)."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2
