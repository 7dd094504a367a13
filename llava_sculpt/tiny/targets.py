"""The two Target tasks: what the base model can see, asked for in a form and an answer format new to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from llava_sculpt.tiny.facts import FACTS, SIGN_WORDS
from llava_sculpt.tiny.scenes import CELL, COLOURS, SHAPES, Item, Scene, board, cell_of, new_scene, random_object, sign
from llava_sculpt.tiny.sources import absent_label, neighbours


@dataclass(frozen=True)
class Choice:
    """A choose-a-text question: `answer` is an index into `choices`."""

    question: str
    choices: tuple[str, ...]
    answer: int
    family: str


def iconqa(rng: Random) -> tuple[Scene, Choice]:
    """A picture and one question with 3 to 5 choices; the gold position is uniform."""
    family = rng.choices(list(_FAMILIES), [weight for weight, _ in _FAMILIES.values()])[0]
    count = rng.randint(3, 5)
    scene, questions, gold, wrong = _FAMILIES[family][1](rng, count)
    position = rng.randrange(count)
    choices = [*wrong[:position], gold, *wrong[position:]]
    return scene, Choice(rng.choice(questions), tuple(choices), position, family)


# What a family makes: a picture, the forms of its question, the right choice, and count - 1 wrong ones.
_Made = tuple[Scene, tuple[str, ...], str, list[str]]


def _others(rng: Random, pool: list[str], gold: str, count: int) -> list[str]:
    return rng.sample([text for text in pool if text != gold], count - 1)


def _absent(rng: Random, items: list[Item], count: int) -> list[str]:
    """`count` labels of things that are not there; half of them share colour or shape with one that is."""
    here = {item.label for item in items}
    found: list[str] = []
    while len(found) < count:
        label = absent_label(rng, items)
        shapes = [item for item in items if item.kind == "shape"]
        if shapes and rng.random() < 0.5:
            like = rng.choice(shapes)
            other_shape, other_colour = rng.choice(SHAPES), rng.choice(list(COLOURS))
            label = f"{like.colour} {other_shape}" if rng.random() < 0.5 else f"{other_colour} {like.name}"
        if label not in here and label not in found:
            found.append(label)
    return found


def _present(rng: Random, count: int) -> _Made:
    scene = board(rng, rng.randint(1, 4))
    items = list(scene.items)
    forms = ("Which of these is in the picture?", "Which one of these can you see?")
    return scene, forms, rng.choice(items).label, _absent(rng, items, count - 1)


def _missing(rng: Random, count: int) -> _Made:
    scene = board(rng, rng.randint(count - 1, 4))
    items = list(scene.items)
    shown = rng.sample([item.label for item in items], count - 1)
    forms = ("Which of these is not in the picture?", "Which one of these is missing?")
    return scene, forms, _absent(rng, items, 1)[0], shown


def _corner(rng: Random, count: int) -> _Made:
    scene = board(rng, rng.randint(2, 4))
    items = list(scene.items)
    target = rng.choice(items)
    row, column = cell_of(target)
    place = f"{('upper', 'lower')[row]} {('left', 'right')[column]}"
    wrong = [item.label for item in items if item is not target][: count - 1]
    wrong += _absent(rng, items, count - 1 - len(wrong))
    rng.shuffle(wrong)
    return scene, (f"Which of these stands in the {place} corner?",), target.label, wrong


def _colour(rng: Random, count: int) -> _Made:
    while True:
        scene = board(rng, rng.randint(1, 3), icon_share=0.3)
        names = [item.name for item in scene.of("shape")]
        single = [item for item in scene.of("shape") if names.count(item.name) == 1]
        if single:
            break
    item = rng.choice(single)
    forms = (f"Which color does the {item.name} have?", f"Choose the color of the {item.name}.")
    return scene, forms, item.colour, _others(rng, list(COLOURS), item.colour, count)


def _kind(rng: Random, count: int) -> _Made:
    scene = board(rng, 1, icon_share=1.0)
    gold = FACTS[scene.items[0].name]["kind"]
    pool = ["animal", "food", "vehicle", "tool", "nature"]
    return scene, ("Which word names the kind of thing shown?",), gold, _others(rng, pool, gold, count)


def _text(rng: Random, count: int) -> _Made:
    is_number = rng.random() < 0.4
    pool = [str(n) for n in range(10, 100)] if is_number else SIGN_WORDS
    gold = rng.choice(pool)
    item = sign(rng, gold, rng.choice(list(COLOURS)), rng.randint(0, 5))
    free_row = 1 if item.y < CELL else 0  # the other object goes into the half of the board without the sign
    thing = random_object(rng, set(), rng.randint(0, 1) * CELL + 1, free_row * CELL + 1, CELL - 2)
    forms = ("Which of these is written in the picture?", "Which of these can you read?")
    return new_scene(rng, [item, thing]), forms, gold, _others(rng, pool, gold, count)


_FAMILIES: dict[str, tuple[float, Callable[[Random, int], _Made]]] = {
    "present": (0.28, _present),
    "missing": (0.16, _missing),
    "corner": (0.16, _corner),
    "color": (0.14, _colour),
    "kind": (0.12, _kind),
    "text": (0.14, _text),
}


def coco(rng: Random) -> tuple[Scene, list[str]]:
    """A picture of one to three objects and five different captions."""
    scene = board(rng, rng.choice((1, 2, 2, 3)))
    return scene, rng.sample(captions(list(scene.items)), 5)


def captions(items: list[Item]) -> list[str]:
    """All captions that the grammar has for these objects (at least 5)."""
    named = [_article(item.label) for item in items]
    if len(items) == 1:
        row, column = cell_of(items[0])
        place = f"{('top', 'bottom')[row]} {('left', 'right')[column]}"
        thing = named[0]
        return [
            f"{thing} in the {place} corner",
            f"a picture of {thing}",
            f"there is {thing} at the {place}",
            f"{thing} alone at the {place}",
            f"{thing} and nothing else",
        ]
    listed = named[0] + " and " + named[1] if len(named) == 2 else f"{named[0]} , {named[1]} and {named[2]}"
    found = [listed, f"a picture of {listed}", f"there are {listed}", f"{listed} on a light background"]
    found += [f"{_article(a.label)} {relation} {_article(b.label)}" for a, relation, b in neighbours(items)]
    if len(items) == 2:
        found += [f"{named[0]} together with {named[1]}", f"{named[1]} and {named[0]}"]
    return list(dict.fromkeys(found))


def _article(label: str) -> str:
    return f"{'an' if label[0] in 'aeiou' else 'a'} {label}"
