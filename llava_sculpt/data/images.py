"""Images: file to RGB, pad to a square, CLIP's resize and normalisation; and a check that a file is whole."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from llava_sculpt.errors import UserError

# Asked for the smallest size, JPEG decodes to an eighth: faster, and still all of the file is read.
_SMALL = (1, 1)


def load_rgb(path: str | Path) -> Image.Image:
    """The image in a file, as RGB. UserError if the file is missing, cut short or not an image."""
    problem = None
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # a broken file makes Pillow raise nearly anything, SyntaxError included
        problem = _image_error(Path(path), error)
    raise UserError(f"{path}: {problem}")


def image_problem(path: str | Path) -> str | None:
    """What is wrong with an image file, or None. Reads all of it, so that a file cut short is found."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of PNG: a file may be cut behind its last pixel; afterwards it is used up
        with Image.open(path) as image:
            image.draft("RGB", _SMALL)
            image.load()
    except Exception as error:  # as in load_rgb
        return _image_error(Path(path), error)
    return None


def image_problems(paths: Iterable[Path], threads: int = 4) -> dict[Path, str]:
    """``image_problem`` of many files, each once; only the bad ones are in the result."""
    unique = list(dict.fromkeys(paths))
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        # Pillow warns of odd metadata and of large images; neither keeps an image from being used.
        warnings.simplefilter("ignore")
        return {path: bad for path, bad in zip(unique, pool.map(image_problem, unique), strict=True) if bad}


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


def _image_error(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "the image is missing"
    if isinstance(error, OSError) and error.strerror:
        return f"the image cannot be read ({error.strerror})"
    if path.is_file() and path.stat().st_size == 0:
        return "the image file is empty (0 bytes)"
    if "truncated" in str(error).lower() or isinstance(error, SyntaxError | EOFError):
        return f"the image file is cut short or damaged ({error})"
    return f"the file is not an image that Pillow can read ({error or type(error).__name__})"
