"""Image files: which are opened and how, whether they are whole, and their hashes, with Pillow alone."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from llava_sculpt.errors import UserError
from llava_sculpt.progress import counted
from llava_sculpt.records import check_regular, file_sha256

# What data sets hold. Pillow knows more, and runs Ghostscript for PostScript, whatever the file is called.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# Of the square that an image is padded to, as large as the largest image that Pillow opens.
LARGEST_SIDE = 13_377  # pixels; its square is just below 178,956,970
# At the smallest draft size JPEG is decoded to an eighth: faster, and the whole file is still read.
_SMALL = (1, 1)
_PROGRESS_FROM = 1000  # images; fewer are read before a bar could be seen


def open_image(path: str | Path) -> Image.Image:
    """The image in a file, not decoded yet. All of the package opens images here.

    Raises:
        UserError: not a regular file, or an image too long or high to be padded to a square.
        Exception: whatever Pillow raises where the file is missing, or holds none of FORMATS.
    """
    check_regular(Path(path))
    image = Image.open(path, formats=FORMATS)
    if max(image.size) > LARGEST_SIDE:
        image.close()
        size = "{:,} x {:,}".format(*image.size)
        raise UserError(f"the image is too large to be padded to a square: {size} (at most {LARGEST_SIDE:,} each)")
    return image


def image_problem(path: str | Path) -> str | None:
    """What is wrong with an image file, or None. Reads all of it, so that a file cut short is found."""
    try:
        with open_image(path) as image:
            image.verify()  # the checksums of PNG: a file may be cut behind its last pixel; afterwards it is used up
        with open_image(path) as image:
            image.draft("RGB", _SMALL)
            image.load()
    except Exception as error:  # as in load_rgb
        return image_error(Path(path), error)
    return None


def outside_problem(folder: str | Path, name: str) -> str | None:
    """Whether an image's name leads out of the image folder, by the letters alone: links in the folder are followed."""
    root = os.path.abspath(folder)
    if os.path.commonpath([root, os.path.abspath(os.path.join(root, name))]) == root:
        return None
    return f"the image {name!r} is not inside the image folder {folder}"


def check_images(paths: Iterable[Path], threads: int | None = None) -> tuple[dict[Path, str], dict[Path, str]]:
    """``image_problem`` of many files, each once, and the sha256 of those that have none.

    A file is hashed as soon as it has been checked, so that it comes from the disk once.

    Threads (default: two a core, at most 16): reading and decoding leave Python's lock, and processes measured
    slower. A bar shows the progress of more than 1,000 images on a terminal.

    Returns:
        problems, by path; hashes, by path.
    """
    unique = list(dict.fromkeys(paths))
    count = threads or min(16, 2 * (os.cpu_count() or 1))

    def look(path: Path) -> tuple[str | None, str]:
        problem = image_problem(path)
        try:
            return problem, "" if problem else file_sha256(path)
        except OSError as error:
            return image_error(path, error), ""

    with warnings.catch_warnings(), ThreadPoolExecutor(count) as pool:
        # Pillow warns of odd metadata and of large images; neither keeps an image from being used.
        warnings.simplefilter("ignore")
        many = len(unique) > _PROGRESS_FROM
        results = list(counted(pool.map(look, unique), "checking images", len(unique), shown=many))
    found = list(zip(unique, results, strict=True))
    problems = {path: problem for path, (problem, _) in found if problem}
    return problems, {path: digest for path, (_, digest) in found if path not in problems}


def images_fingerprint(hashes: Mapping[str, str]) -> str:
    """sha256 over the names of images and the hashes of their files, in the order of the names."""
    return hashlib.sha256(json.dumps(sorted(hashes.items())).encode()).hexdigest()


def image_error(path: Path, error: Exception) -> str:
    """The message for an exception that Pillow raised on opening `path`."""
    if isinstance(error, UserError):
        return str(error).removeprefix(f"{path}: ")
    if isinstance(error, FileNotFoundError):
        return "the image is missing"
    if isinstance(error, OSError) and error.strerror:
        return f"the image cannot be read ({error.strerror})"
    if path.is_file() and path.stat().st_size == 0:
        return "the image file is empty (0 bytes)"
    if "truncated" in str(error).lower() or isinstance(error, SyntaxError | EOFError):
        return f"the image file is cut short or damaged ({error})"
    return f"the file is not an image that Pillow can read ({error or type(error).__name__})"
