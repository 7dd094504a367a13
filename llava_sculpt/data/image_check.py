"""Checks that image files are complete, with Pillow alone."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

# At the smallest draft size JPEG is decoded to an eighth: faster, and the whole file is still read.
_SMALL = (1, 1)
_PROGRESS_FROM = 1000  # images; fewer are read before a bar could be seen


def image_problem(path: str | Path) -> str | None:
    """What is wrong with an image file, or None. Reads all of it, so that a file cut short is found."""
    try:
        with Image.open(path) as image:
            image.verify()  # the checksums of PNG: a file may be cut behind its last pixel; afterwards it is used up
        with Image.open(path) as image:
            image.draft("RGB", _SMALL)
            image.load()
    except Exception as error:  # as in load_rgb
        return image_error(Path(path), error)
    return None


def image_problems(paths: Iterable[Path], threads: int | None = None) -> dict[Path, str]:
    """``image_problem`` of many files, each once; only the bad ones are in the result.

    Threads (default: two a core, at most 16): reading and decoding leave Python's lock, and processes measured
    slower. A bar shows the progress of more than 1,000 images on a terminal.
    """
    unique = list(dict.fromkeys(paths))
    count = threads or min(16, 2 * (os.cpu_count() or 1))
    hidden = None if len(unique) > _PROGRESS_FROM else True
    with warnings.catch_warnings(), ThreadPoolExecutor(count) as pool:
        # Pillow warns of odd metadata and of large images; neither keeps an image from being used.
        warnings.simplefilter("ignore")
        results = tqdm(pool.map(image_problem, unique), "checking images", len(unique), disable=hidden, leave=False)
        return {path: bad for path, bad in zip(unique, results, strict=True) if bad}


def image_error(path: Path, error: Exception) -> str:
    """The message for an exception that Pillow raised on opening `path`."""
    if isinstance(error, FileNotFoundError):
        return "the image is missing"
    if isinstance(error, OSError) and error.strerror:
        return f"the image cannot be read ({error.strerror})"
    if path.is_file() and path.stat().st_size == 0:
        return "the image file is empty (0 bytes)"
    if "truncated" in str(error).lower() or isinstance(error, SyntaxError | EOFError):
        return f"the image file is cut short or damaged ({error})"
    return f"the file is not an image that Pillow can read ({error or type(error).__name__})"
