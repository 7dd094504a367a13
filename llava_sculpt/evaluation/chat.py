"""A conversation with a model, in the form it was trained on, whose key-value cache is kept from turn to turn."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, cast

import torch
from peft import PeftModel
from PIL import Image
from transformers import DynamicCache

from llava_sculpt.artifacts.inference import Inference
from llava_sculpt.data.collator import expand_image
from llava_sculpt.data.conversation import encode_prompt, question_problems, record_problems
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.decode import check_logits

_HALF = "\ufffd"  # how decoding writes bytes that are no whole character, or none yet


def context_of(loaded: Inference) -> int:
    """Tokens that the model can read, prompt and answer together."""
    return int(cast(Any, loaded.model).config.text_config.max_position_embeddings)


def prompt_ids(loaded: Inference, question: str, has_image: bool, rounds: Sequence[tuple[str, str]] = ()) -> list[int]:
    """`encode_prompt` with an id for every position of the image.

    Raises:
        UserError: what `question_problems` finds, or no room for an answer in the model's context.
    """
    problems = question_problems(question)
    if problems:
        raise UserError(problems)
    prompt = encode_prompt(question, loaded.tokenizer, has_image, rounds)
    ids = expand_image(prompt, [loaded.checkpoint.image_token_id] * loaded.checkpoint.image_tokens, prompt)
    if len(ids) >= context_of(loaded):
        before = "with the conversation so far, begin a new one; " if rounds else ""
        raise UserError(
            f"the question {question[:40]!r} does not fit into the model's context of {context_of(loaded):,} tokens: "
            f"{before}the model would read {len(ids):,}"
        )
    return ids


class Chat:
    """Questions and answers about one picture, or none; decoding is greedy.

    The model reads every turn as the same turns in a training record. What it has read stays in the key-value cache:
    a turn costs its own tokens, and neither the picture nor the earlier turns are read again.

    Attributes:
        rounds: (question, answer) of the turns so far.
        note: what is to be known about the last answer (cut off, not kept), or None.
    """

    def __init__(self, loaded: Inference, image: Image.Image | None = None, max_new_tokens: int = 512) -> None:
        """`image`: in RGB."""
        self.llava = cast(Any, loaded.model.get_base_model() if isinstance(loaded.model, PeftModel) else loaded.model)
        self.loaded = loaded
        self.pixels = None if image is None else loaded.preprocessor(image)[None]
        self.max_new_tokens = max_new_tokens
        self.rounds: list[tuple[str, str]] = []
        self.note: str | None = None
        self._cache: Any = DynamicCache()
        self._read_ids: list[int] = []  # what the cache holds for certain; an interrupted step may have left more

    def ask(self, question: str) -> str:
        """The answer to the next question, which becomes a turn of the conversation.

        Raises:
            UserError: the question is empty, holds a mark of the conversation, or does not fit into the context.
        """
        return "".join(self.stream(question))

    def stream(self, question: str) -> Generator[str, None, None]:
        """`ask` piece by piece, as the model says them: whole characters, which together are the answer.

        When the iterator is closed or interrupted, what has been said is the answer. An answer that no training record
        could hold (an empty one, for instance) is left out of the conversation with its question; `note` says so.

        Raises:
            UserError: as `ask`, before anything is said.
        """
        question = question.strip()
        return self._answer(question, prompt_ids(self.loaded, question, self.pixels is not None, self.rounds))

    def _answer(self, question: str, ids: list[int]) -> Generator[str, None, None]:
        said: list[int] = []
        shown = ""
        self.note = "interrupted"
        try:
            while (token := self._next_token(ids + said)) != self.loaded.tokenizer.eos_id:
                said.append(token)
                whole = self.loaded.tokenizer.decode(said).rstrip(_HALF).strip()
                if len(whole) > len(shown):
                    # Before the piece is handed out: that is where the caller may stop.
                    piece, shown = whole[len(shown) :], whole
                    yield piece
                if len(said) == self.max_new_tokens:
                    self.note = f"cut off after {self.max_new_tokens:,} tokens"
                    break
                if len(ids) + len(said) == context_of(self.loaded):
                    self.note = f"cut off: the model's context of {context_of(self.loaded):,} tokens is full"
                    break
            else:
                self.note = None
            rest = self.loaded.tokenizer.decode(said).strip()[len(shown) :]
            shown += rest
            if rest:
                yield rest
        finally:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": shown}]
            if record_problems({"conversations": turns}):
                why = "holds a mark of the conversation" if shown else "is empty"
                self.note = f"{self.note}; " * bool(self.note) + f"the answer {why}: this turn is not kept"
            else:
                self.rounds.append((question, shown))

    @torch.inference_mode()
    def _next_token(self, ids: Sequence[int]) -> int:
        """The best token behind `ids`, of which the model reads what is not in the cache."""
        pairs = enumerate(zip(self._read_ids, ids, strict=False))
        known = next((at for at, (read, wanted) in pairs if read != wanted), len(self._read_ids))
        known = min(known, len(ids) - 1)
        pixels = {}
        if self.pixels is not None and self.loaded.checkpoint.image_token_id in ids[known:]:
            known = 0
            weight = self.llava.get_input_embeddings().weight
            pixels = {"pixel_values": self.pixels.to(weight.device, weight.dtype)}
        if known == 0:
            self._cache = DynamicCache()
        for layer in self._cache.layers:
            layer.keys, layer.values = layer.keys[:, :, :known], layer.values[:, :, :known]
        self._read_ids = list(ids[:known])
        new = torch.tensor([ids[known:]], device=self.llava.device)
        output = self.llava(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=1, **pixels)
        self._read_ids = list(ids)
        best = output.logits[0, -1, : self.loaded.tokenizer.vocab_size].float().max(dim=0)
        check_logits([best.values.item()], self.llava.dtype)
        return int(best.indices)
