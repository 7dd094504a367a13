"""Pictures of the tiny world: what stands where, and how it is painted on 48 x 48 pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from random import Random

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from llava_sculpt.tiny.assets import ICONS, icon

SIZE = 48
PATCH = 8  # also the pitch of rendered characters: one character per patch
GRID = SIZE // PATCH
CELL = 24  # object scenes are a 2 x 2 board of cells

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40), "orange": (245, 130, 20), "yellow": (240, 208, 30), "green": (40, 160, 60),
    "blue": (40, 90, 215), "purple": (140, 60, 170), "black": (25, 25, 25),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "diamond", "cross", "ring")
CHARACTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
BACKGROUNDS = (
    (255, 255, 255), (250, 245, 235), (238, 244, 252), (240, 250, 240), (252, 240, 246), (236, 236, 236),
)  # fmt: skip

# What a patch can show, for the training of the tower: nothing, an icon, a shape or a character.
PATCH_CLASSES = ("", *ICONS, *SHAPES, *CHARACTERS)
PATCH_COLOURS = ("", *COLOURS)


@dataclass(frozen=True)
class Item:
    """An icon, a coloured shape, or a sign (light characters on a coloured strip, one per patch).

    `kind` is "icon", "shape" or "sign"; `name` the icon's or shape's name or the sign's text; `x`, `y` the
    top left pixel and `size` the width in pixels (a sign is 8 high).
    """

    kind: str
    name: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def label(self) -> str:
        """How questions and answers call it."""
        return f"{self.colour} {self.name}" if self.kind == "shape" else self.name.lower()


@dataclass(frozen=True)
class Scene:
    """One picture: a background colour and the items on it, in reading order."""

    background: tuple[int, int, int]
    items: tuple[Item, ...]

    def of(self, kind: str) -> list[Item]:
        """The items of one kind."""
        return [item for item in self.items if item.kind == kind]


def new_scene(rng: Random, items: list[Item]) -> Scene:
    """A scene with these items on a random light background."""
    return Scene(rng.choice(BACKGROUNDS), tuple(items))


def random_object(rng: Random, taken: set[str], x: int, y: int, room: int, icon_share: float = 0.6) -> Item:
    """An icon or shape with a label not in `taken` (which it joins), anywhere in a square `room` wide."""
    while True:
        size = rng.randint(17, 20) if room >= 20 else room
        kind = "icon" if rng.random() < icon_share else "shape"
        name = rng.choice(list(ICONS) if kind == "icon" else SHAPES)
        colour = rng.choice(list(COLOURS)) if kind == "shape" else ""
        item = Item(kind, name, colour, x + rng.randint(0, room - size), y + rng.randint(0, room - size), size)
        if item.label not in taken:
            taken.add(item.label)
            return item


def board(rng: Random, count: int, icon_share: float = 0.6) -> Scene:
    """`count` (1..4) different objects, each in its own cell of the 2 x 2 board."""
    cells = sorted(rng.sample(range(4), count))
    taken: set[str] = set()
    items = [random_object(rng, taken, c % 2 * CELL + 1, c // 2 * CELL + 1, CELL - 2, icon_share) for c in cells]
    return new_scene(rng, items)


def sign(rng: Random, text: str, colour: str, row: int) -> Item:
    """A sign at patch row `row`, at a random patch column."""
    width = len(text) * PATCH
    return Item("sign", text.upper(), colour, PATCH * rng.randint(0, GRID - len(text)), PATCH * row, width)


def cell_of(item: Item) -> tuple[int, int]:
    """(row, column) of an object on the 2 x 2 board."""
    middle = item.size // 2
    return (item.y + middle) // CELL, (item.x + middle) // CELL


@cache
def _character(character: str) -> Image.Image:
    """One character as a mask of 8 x 8 pixels."""
    mask = Image.new("L", (PATCH, PATCH), 0)
    font = ImageFont.load_default(10)
    ImageDraw.Draw(mask).text((PATCH / 2, PATCH - 0.5), character, font=font, fill=255, anchor="ms")
    return mask


@cache
def _shape(name: str, size: int) -> Image.Image:
    """One shape as a mask of `size` x `size` pixels, drawn four times as large and shrunk."""
    n = size * 4
    mask = Image.new("L", (n, n), 0)
    draw = ImageDraw.Draw(mask)
    edge, third = n - 1, n // 3
    if name in ("circle", "ring"):
        draw.ellipse((0, 0, edge, edge), fill=255)
        if name == "ring":
            draw.ellipse((n // 4, n // 4, edge - n // 4, edge - n // 4), fill=0)
    elif name == "square":
        draw.rectangle((n // 12, n // 12, edge - n // 12, edge - n // 12), fill=255)
    elif name == "triangle":
        draw.polygon([(n // 2, 0), (edge, edge), (0, edge)], fill=255)
    elif name == "diamond":
        draw.polygon([(n // 2, 0), (edge, n // 2), (n // 2, edge), (0, n // 2)], fill=255)
    else:
        draw.rectangle((third, 0, edge - third, edge), fill=255)
        draw.rectangle((0, third, edge, edge - third), fill=255)
    return mask.resize((size, size), Image.Resampling.LANCZOS)


def render(scene: Scene) -> Image.Image:
    """The picture, RGB, 48 x 48."""
    image = Image.new("RGB", (SIZE, SIZE), scene.background)
    for item in scene.items:
        if item.kind == "icon":
            picture = icon(item.name, item.size)
            image.paste(picture, (item.x, item.y), picture)
        elif item.kind == "shape":
            image.paste(COLOURS[item.colour], (item.x, item.y), _shape(item.name, item.size))
        else:
            image.paste(COLOURS[item.colour], (item.x, item.y, item.x + item.size, item.y + PATCH))
            ink = (0, 0, 0) if item.colour == "yellow" else (255, 255, 255)
            for i, character in enumerate(item.name):
                image.paste(ink, (item.x + i * PATCH, item.y), _character(character))
    return image


def encoded(scene: Scene, kind: str = "JPEG") -> bytes:
    """The picture as a JPEG (quality 95, no chroma subsampling) or PNG file."""
    buffer = io.BytesIO()
    render(scene).save(buffer, kind, quality=95, subsampling=0)
    return buffer.getvalue()


def patch_tags(scene: Scene) -> np.ndarray:
    """What each patch shows: int64 [36, 2], indices into PATCH_CLASSES and PATCH_COLOURS."""
    tags = np.zeros((GRID, GRID, 2), dtype=np.int64)
    for item in scene.items:
        if item.kind == "sign":
            row, column = item.y // PATCH, item.x // PATCH
            for i, character in enumerate(item.name):
                tags[row, column + i] = PATCH_CLASSES.index(character), PATCH_COLOURS.index(item.colour)
            continue
        for patch in patches_of(item):
            tags[divmod(patch, GRID)] = PATCH_CLASSES.index(item.name), PATCH_COLOURS.index(item.colour)
    return tags.reshape(GRID * GRID, 2)


def patches_of(item: Item) -> list[int]:
    """Numbers (0..35, row by row) of the patches of which the item covers at least a third."""
    height = PATCH if item.kind == "sign" else item.size
    return [
        row * GRID + column
        for row in range(GRID)
        for column in range(GRID)
        if _overlap(item.y, height, row) * _overlap(item.x, item.size, column) * 3 >= PATCH * PATCH
    ]


def _overlap(start: int, size: int, index: int) -> int:
    """Pixels that the interval [start, start + size) shares with patch `index`."""
    return max(0, min(start + size, (index + 1) * PATCH) - max(start, index * PATCH))
