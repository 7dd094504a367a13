"""The four Source tasks: a random picture and everything that can be asked about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from llava_sculpt.tiny.assets import ICONS
from llava_sculpt.tiny.facts import AUTHORS, FACT_QUESTIONS, FACTS, GENRES, SIGN_WORDS, TITLE_WORDS
from llava_sculpt.tiny.scenes import COLOURS, SHAPES, SIZE, Item, Scene, board, cell_of, new_scene, random_object, sign


@dataclass(frozen=True)
class QA:
    """A question with its short answer, grounded in the picture.

    `family` is its kind ("relation", "kind", "title", ...). `mentions` are the words in `text` that name an object,
    each with the item that it is (None: not in the picture); `seen` is the item that shows the answer.
    """

    text: str
    answer: str
    family: str
    mentions: tuple[tuple[str, Item | None], ...] = ()
    seen: Item | None = None


Sample = tuple[Scene, list[QA]]


def okvqa(rng: Random) -> Sample:
    """Knowledge about one icon: what kind of thing it is, where it is found, what it is used for."""
    item = random_object(rng, set(), 2, 2, SIZE - 4, icon_share=1.0)
    questions = [
        QA(rng.choice(FACT_QUESTIONS[fact]), answer, fact, seen=item) for fact, answer in FACTS[item.name].items()
    ]
    return new_scene(rng, [item]), questions


def ocrvqa(rng: Random) -> Sample:
    """A book cover: title, author, year as two digits, and an icon that stands for the genre."""
    title, author, genre = rng.choice(TITLE_WORDS), rng.choice(AUTHORS), rng.choice(list(GENRES))
    year = str(rng.randint(10, 99))
    colours = rng.sample(list(COLOURS), 3)
    size = rng.randint(17, 20)
    picture = Item("icon", GENRES[genre], "", rng.randint(0, SIZE - size), 8 + rng.randint(0, 24 - size), size)
    words = [sign(rng, text, c, row) for text, c, row in zip((title, author, year), colours, (0, 4, 5), strict=True)]
    questions = [
        QA(rng.choice(("What is the title of this book?", "What is this book called?")), title, "title", seen=words[0]),
        QA(rng.choice(("Who is the author of this book?", "Who wrote this book?")), author, "author", seen=words[1]),
        QA(rng.choice(("What is the genre of this book?", "What type of book is this?")), genre, "genre", seen=picture),
        QA("Which year is printed on this book?", year, "year", seen=words[2]),
    ]
    return new_scene(rng, [words[0], picture, *words[1:]]), questions


def textvqa(rng: Random) -> Sample:
    """Two signs with a word or number each, above and below an icon or shape."""
    count = 1 if rng.random() < 0.2 else 2
    numbers = [rng.random() < 0.4 for _ in range(count)]
    texts: list[str] = []
    for is_number in numbers:
        text = str(rng.randint(10, 99)) if is_number else rng.choice(SIGN_WORDS)
        while text in texts:
            text = rng.choice(SIGN_WORDS)
        texts.append(text)
    colours = rng.sample(list(COLOURS), count)
    rows = sorted(rng.sample((rng.randint(0, 1), rng.randint(4, 5)), count))
    top = 8 * (rows[0] + 1) if rows[0] < 2 else 2
    bottom = 8 * rows[-1] if rows[-1] > 3 else SIZE - 2
    room = min(22, bottom - top)
    thing = random_object(rng, set(), rng.randint(0, SIZE - room), rng.randint(top, bottom - room), room)
    signs = [sign(rng, text, c, row) for text, c, row in zip(texts, colours, rows, strict=True)]
    questions = []
    for text, colour, item in zip(texts, colours, signs, strict=True):
        what = "number" if text.isdigit() else "word"
        questions.append(QA(f"What does the {colour} sign say?", text, "sign", ((f"{colour} sign", item),), item))
        if sum(t.isdigit() for t in texts) == 1 or (count == 1):
            form = rng.choice((f"What {what} is shown?", f"What is the {what} in the picture?"))
            questions.append(QA(form, text, what, seen=item))
        side = "above" if item.y < thing.y else "below"
        questions.append(QA(f"What is written {side} the {thing.label}?", text, side, ((thing.label, thing),), item))
    return new_scene(rng, sorted([*signs, thing], key=lambda item: item.y)), questions


def gqa(rng: Random) -> Sample:
    """Two or three objects on a 2 x 2 board: colours, positions, relations, small counts."""
    scene = board(rng, rng.choice((2, 3)))
    items = list(scene.items)
    questions = [*_attributes(rng, items), *_positions(rng, items)]
    questions += [*_relations(rng, items), *_counts(rng, items)]
    return scene, list({q.text: q for q in questions}.values())


def absent_label(rng: Random, items: list[Item]) -> str:
    """The label of an icon or shape that is not among `items`."""
    here = {item.label for item in items}
    while True:
        is_icon = rng.random() < 0.6
        label = rng.choice(list(ICONS)) if is_icon else f"{rng.choice(list(COLOURS))} {rng.choice(SHAPES)}"
        if label not in here:
            return label


def _attributes(rng: Random, items: list[Item]) -> list[QA]:
    shapes = [item for item in items if item.kind == "shape"]
    questions = []
    for item in shapes:
        by_name, by_colour = ((item.name, item),), ((item.colour, item),)
        if [s.name for s in shapes].count(item.name) == 1:
            questions.append(QA(f"What color is the {item.name}?", item.colour, "color", by_name, item))
        if [s.colour for s in shapes].count(item.colour) == 1:
            questions.append(QA(f"Which shape is {item.colour}?", item.name, "shape", by_colour, item))
    return questions


def _positions(rng: Random, items: list[Item]) -> list[QA]:
    questions = []
    for item in items:
        row, column = cell_of(item)
        vertical, horizontal = ("top", "bottom")[row], ("left", "right")[column]
        questions.append(QA(f"What is at the {vertical} {horizontal}?", item.label, "place", seen=item))
    item = rng.choice(items)
    row, column = cell_of(item)
    for form, answer in (
        ("on the left or on the right", ("left", "right")[column]),
        ("at the top or at the bottom", ("top", "bottom")[row]),
    ):
        named = ((item.label, item),)
        questions.append(QA(f"Is the {item.label} {form}?", answer, "side", named, item))
    return questions


_RELATIONS: dict[str, Callable[[Item, Item], bool]] = {
    "to the left of": lambda a, b: cell_of(a)[0] == cell_of(b)[0] and cell_of(a)[1] < cell_of(b)[1],
    "to the right of": lambda a, b: cell_of(a)[0] == cell_of(b)[0] and cell_of(a)[1] > cell_of(b)[1],
    "above": lambda a, b: cell_of(a)[1] == cell_of(b)[1] and cell_of(a)[0] < cell_of(b)[0],
    "below": lambda a, b: cell_of(a)[1] == cell_of(b)[1] and cell_of(a)[0] > cell_of(b)[0],
}


def neighbours(items: list[Item]) -> list[tuple[Item, str, Item]]:
    """All (a, relation, b) with "a relation b"; only objects in one row or column are related."""
    pairs = [(a, b) for a in items for b in items if a is not b]
    return [(a, name, b) for a, b in pairs for name, holds in _RELATIONS.items() if holds(a, b)]


def _relations(rng: Random, items: list[Item]) -> list[QA]:
    related = neighbours(items)
    chosen = rng.sample(related, min(4, len(related)))
    return [QA(f"What is {name} the {b.label}?", a.label, "relation", ((b.label, b),), a) for a, name, b in chosen]


def _counts(rng: Random, items: list[Item]) -> list[QA]:
    shapes = sum(item.kind == "shape" for item in items)
    questions = [
        QA("How many things are there?", str(len(items)), "count"),
        QA("How many shapes are there?", str(shapes), "count"),
    ]
    return [rng.choice(questions)]


SOURCES: dict[str, Callable[[Random], Sample]] = {
    "okvqa": okvqa,
    "ocrvqa": ocrvqa,
    "gqa": gqa,
    "textvqa": textvqa,
}
