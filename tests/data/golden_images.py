"""Images that the golden data refers to by size, so that no image has to be stored."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def write_image(folder: Path, name: str) -> Path:
    """Write ``WIDTHxHEIGHT-MODE.png``, the name saying what is in it; returns its path."""
    size, mode = name.removesuffix(".png").split("-")
    width, height = map(int, size.split("x"))
    channels = {"L": 1, "RGB": 3, "RGBA": 4}[mode]
    values = bytes(
        (7 * x * (c + 1) + 13 * y + (x * y) % 61 * (c + 2)) % 256
        for y in range(height)
        for x in range(width)
        for c in range(channels)
    )
    path = folder / name
    Image.frombytes(mode, (width, height), values).save(path)
    return path
