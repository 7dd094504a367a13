"""Asking a model about pictures from Python: `from llava_sculpt import load`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, overload

from PIL import Image

from llava_sculpt.artifacts.inference import Inference, load_for_inference
from llava_sculpt.data.images import load_rgb
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.chat import Chat, prompt_ids
from llava_sculpt.evaluation.generate import generate_answers

Picture = str | os.PathLike[str] | Image.Image  # a file, or the picture itself


def load(path: str | os.PathLike[str], base: str | None = None, *, beside: Model | None = None) -> Model:
    """A model ready to answer: a run, a base or merged model, or the id of one on the Hub.

    In float32 on a CPU, in float16 on a GPU (bfloat16 if the base is stored so).

    Args:
        base: base checkpoint to use instead of the one that a run's adapter names.
        beside: a model loaded before; weights that are the same in both are in memory once.

    Raises:
        UserError: what is missing or does not fit, before any weight is loaded.
    """
    return Model(load_for_inference(os.fspath(path), base=base, beside=None if beside is None else beside.loaded))


class Model:
    """A loaded model; `ask` for single questions, `chat` for questions that build on each other."""

    def __init__(self, loaded: Inference) -> None:
        self.loaded = loaded

    @overload
    def ask(
        self, image: Picture | None, question: str, *, batch_size: int | None = None, max_new_tokens: int = 128
    ) -> str: ...

    @overload
    def ask(
        self, image: Any, question: Any, *, batch_size: int | None = None, max_new_tokens: int = 128
    ) -> list[str]: ...

    def ask(
        self, image: Any, question: Any, *, batch_size: int | None = None, max_new_tokens: int = 128
    ) -> str | list[str]:
        """The greedy answer to a question, in the words of `llava-sculpt eval`.

        Args:
            image: a file, a PIL image, or None for a question without a picture; or a list of these.
            question: without `<image>`; or a list. Of two lists each question is about the image in its place; a
                single image or question goes with every entry of the other list.
            batch_size: questions at a time (default: see `generate_answers`); changes no answer in float32.
            max_new_tokens: where an answer is cut off.

        Returns:
            The answer, stripped; a list of them, in order, if `image` or `question` is a list.

        Raises:
            UserError: an image that cannot be read; a question that is empty, holds a mark of the conversation, or does
                not fit into the model's context; lists of different lengths; a number below 1.
        """
        lists = [value for value in (image, question) if isinstance(value, list | tuple)]
        if len({len(value) for value in lists}) > 1:
            raise UserError(f"{len(image)} images and {len(question)} questions: give one of either, or as many")
        count = len(lists[0]) if lists else 1
        images = list(image) if isinstance(image, list | tuple) else [image] * count
        texts = list(question) if isinstance(question, list | tuple) else [question] * count
        problems = _number_problems(batch_size=batch_size, max_new_tokens=max_new_tokens)
        for text, has_image in dict.fromkeys(zip(texts, [picture is not None for picture in images], strict=True)):
            try:
                prompt_ids(self.loaded, text, has_image)
            except UserError as error:
                problems += error.problems
        if problems:
            raise UserError(problems)
        rgb = {id(picture): _as_asked(picture) for picture in images}
        asked = [
            {"text": text} if picture is None else {"text": text, "image": rgb[id(picture)]}
            for text, picture in zip(texts, images, strict=True)
        ]
        parts = self.loaded.model, self.loaded.tokenizer, self.loaded.preprocessor
        answers: dict[int, str] = {}
        for some in generate_answers(*parts, asked, Path(), batch_size, max_new_tokens):
            answers |= some
        found = [answers[place] for place in range(count)]
        return found if lists else found[0]

    def chat(self, image: Picture | None = None, *, max_new_tokens: int = 512) -> Chat:
        """A conversation of several turns about one picture, or none.

        Raises:
            UserError: an image that cannot be read, a number below 1.
        """
        problems = _number_problems(max_new_tokens=max_new_tokens)
        if problems:
            raise UserError(problems)
        picture = _as_asked(image)
        return Chat(self.loaded, load_rgb(picture) if isinstance(picture, str) else picture, max_new_tokens)


def _number_problems(**numbers: int | None) -> list[str]:
    """Error messages about numbers that must be at least 1, where they are given."""
    return [f"{name} must be at least 1, got {n}" for name, n in numbers.items() if n is not None and n < 1]


def _as_asked(picture: Any) -> str | Image.Image | None:
    """A file's name, or an RGB image."""
    if picture is None:
        return None
    if not isinstance(picture, Image.Image):
        return os.fspath(picture)
    try:
        return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:  # opened, but not read yet, from a damaged file
        raise UserError(f"{getattr(picture, 'filename', '') or 'an image'}: cannot be read ({error})") from error
