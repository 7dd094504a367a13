"""The commands `ask` and `chat`: questions from the command line or the keyboard, answers on the terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from itertools import groupby
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING

from llava_sculpt.data.conversation import question_problems
from llava_sculpt.data.image_check import image_problem
from llava_sculpt.errors import UserError

if TYPE_CHECKING:
    from llava_sculpt.evaluation.chat import Chat

_HELP = """\
/image PATH  a new conversation, about that picture
/reset       a new conversation about the same picture
/quit        end, as ctrl-D does
ctrl-C stops an answer; what has been said stays in the conversation."""


def ask(
    model: str,
    images: Sequence[Path],
    questions: Sequence[str],
    *,
    base: str | None,
    batch_size: int | None,
    max_new_tokens: int,
    as_json: bool,
) -> None:
    """Print the answer to every question about every image: alone if it is the only one, else below its question.

    Raises:
        UserError: everything that is wrong with images and questions, before the model is looked at.
    """
    problems = _image_problems(images) + [problem for text in questions for problem in question_problems(text)]
    if problems:
        raise UserError(problems)
    from llava_sculpt.evaluation.ask import load

    about: Sequence[Path | None] = images or [None]
    asked = [(image, question) for image in about for question in questions]
    pictures, texts = [image for image, _ in asked], [question for _, question in asked]
    answers = load(model, base).ask(pictures, texts, batch_size=batch_size, max_new_tokens=max_new_tokens)
    found = [
        {"image": None if image is None else str(image), "question": question, "answer": answer}
        for (image, question), answer in zip(asked, answers, strict=True)
    ]
    if as_json:
        print(json.dumps(found, indent=2))
    elif len(found) == 1:
        print(answers[0])
    else:
        for name, entries in groupby(found, key=lambda entry: entry["image"]):
            lines = [line for entry in entries for line in (f"Q: {entry['question']}", f"A: {entry['answer']}")]
            text = "\n".join(line.replace("\n", "\n   ") for line in lines)
            print(text if name is None else f"{name}\n{indent(text, '  ')}")


def chat(model: str, image: Path | None, *, base: str | None, max_new_tokens: int) -> None:
    """Hold a conversation: on a terminal with prompts, otherwise a question a line and nothing but answers on stdout.

    Raises:
        UserError: a broken image or a wrong number, before the model is looked at; if the questions do not come from a
            terminal, also whatever is wrong with one of them.
    """
    problems = _image_problems([image] if image else [])
    if problems:
        raise UserError(problems)
    from llava_sculpt.evaluation.ask import load

    loaded = load(model, base)
    talk = loaded.chat(image, max_new_tokens=max_new_tokens)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        with suppress(ImportError):
            import readline  # noqa: F401  # editing and history for `input`
        print("/help lists the commands")
    while (line := _next_line(interactive)) is not None:
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            elif command == "/help":
                print(_HELP)
            elif command == "/reset":
                talk = loaded.chat(image, max_new_tokens=max_new_tokens)
            elif command == "/image" and rest:
                given = Path(rest.strip().strip("\"'")).expanduser()
                talk, image = loaded.chat(given, max_new_tokens=max_new_tokens), given
            elif command.startswith("/"):
                raise UserError(f"{line}: the commands are /image PATH, /reset, /quit, /help")
            elif line:
                _answer(talk, line, interactive)
        except UserError as error:
            if not interactive:
                raise
            print(*error.problems, sep="\n", file=sys.stderr)


def _answer(talk: Chat, question: str, interactive: bool) -> None:
    """Print an answer as it comes; ctrl-C ends it, without a terminal also the conversation."""
    try:
        with closing(talk.stream(question)) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
    print(flush=True)
    if talk.note:
        print(f"({talk.note})", file=sys.stderr)


def _next_line(interactive: bool) -> str | None:
    """The next line without spaces around it, None at the end; ctrl-C discards a line on a terminal."""
    while True:
        try:
            return input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return None
        except UnicodeDecodeError as error:
            raise UserError(f"standard input: not UTF-8 text ({error})") from error
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()


def _image_problems(images: Sequence[Path]) -> list[str]:
    found = {path: image_problem(path) for path in images}
    return [f"{path}: {problem}" for path, problem in found.items() if problem]
