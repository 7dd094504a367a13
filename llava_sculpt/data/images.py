"""Images: file to RGB, pad to a square, CLIP's resize and normalisation."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_sculpt.data.image_check import image_error, open_image
from llava_sculpt.errors import UserError


def load_rgb(path: str | Path) -> Image.Image:
    """The image in a file, as RGB. UserError if the file is missing, cut short or not an image."""
    problem = None
    try:
        with open_image(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a broken file makes Pillow raise nearly anything, SyntaxError included
        problem = image_error(Path(path), error)
    raise UserError(f"{path}: {problem}")


class ImagePreprocessor:
    """RGB image to pixels as LLaVA-1.5 sees them: padded to a square with CLIP's mean colour, resized, normalised.

    The Pillow backend of CLIP's processor gives the pixels of the original package bit for bit.
    """

    def __init__(self, processor: CLIPImageProcessorPil) -> None:
        self.processor = processor
        red, green, blue = (int(value * 255) for value in processor.image_mean)
        self._background = (red, green, blue)

    @classmethod
    def from_dir(cls, path: str | Path) -> ImagePreprocessor:
        """Read ``preprocessor_config.json`` of a checkpoint folder; UserError if it is missing or broken."""
        file = Path(path) / "preprocessor_config.json"
        if not file.is_file():
            raise UserError(f"{file}: not found; a LLaVA-1.5 checkpoint folder holds CLIP's settings there")
        try:
            return cls(CLIPImageProcessorPil.from_pretrained(str(path), local_files_only=True))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{file}: not the settings of a CLIP image processor ({error})") from error

    def __call__(self, image: Image.Image) -> torch.Tensor:
        """RGB image of any size to a float32 tensor [3, H, W]."""
        square = pad_to_square(image, self._background)
        pixels: torch.Tensor = self.processor(square, return_tensors="pt")["pixel_values"][0]
        return pixels


def pad_to_square(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """The RGB image in the middle of the smallest square that holds it (an odd pixel goes right or below)."""
    width, height = image.size
    side = max(width, height)
    if width == height:
        return image
    square = Image.new("RGB", (side, side), background)
    square.paste(image, ((side - width) // 2, (side - height) // 2))
    return square
