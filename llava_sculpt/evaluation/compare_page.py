"""The page of a comparison: one HTML file that needs nothing else, with every picture small and in it once.

The template is `compare.html` beside this module.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from llava_sculpt.data.image_check import image_error
from llava_sculpt.errors import UserError
from llava_sculpt.evaluation.compare import CLEAR_CIDER, GOOD_CAPTION, KINDS, Comparison, Item
from llava_sculpt.evaluation.figure import draw_source_target
from llava_sculpt.evaluation.table import table_cells
from llava_sculpt.names import task_label
from llava_sculpt.records import write_atomically

SHOWN = 2000  # questions
PAGE_BYTES = 5_000_000
_TEXT_BYTES = 3_000_000  # of them without pictures
_PICTURE_BYTES = 10_000  # of one picture at most
_TEXT = 400  # characters of a question or an answer
_GOLD = 5  # gold answers of a question
# (longest side in pixels, WebP quality) of a picture, from what is wanted to what always has room.
_SIZES = ((224, 75), (192, 70), (160, 65), (128, 60), (112, 50), (96, 45), (80, 40), (64, 35), (64, 10), (48, 5))
_BYTES_PER_PIXEL = 0.04  # fewer than of nearly any picture: where this is too much, encoding need not be tried


def write_page(comparison: Comparison, out: Path) -> int:
    """Write the page; returns how many questions it shows. More than SHOWN, or than have room, are left out.

    Raises:
        UserError: a picture that cannot be read, or a file that cannot be written.
    """
    items = _chosen(comparison.items)
    while len(page := _render(comparison, items, {})) > _TEXT_BYTES and len(items) > 1:
        items = items[: int(len(items) * min(0.9, _TEXT_BYTES / len(page)))]
    shown = sorted(items, key=lambda item: comparison.tasks.index(item.task))
    pictures = _pictures(shown, PAGE_BYTES - len(page))
    page = _render(comparison, shown, pictures)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"{out}: cannot write the page: {error}") from error
    return len(shown)


def _chosen(items: Sequence[Item]) -> list[Item]:
    """The questions to show, the most telling first: in the order of KINDS, as many of each task."""
    order = list(KINDS)
    by_task: dict[str, list[Item]] = {}
    for item in sorted(items, key=lambda item: min(map(order.index, item.kinds))):
        by_task.setdefault(item.task, []).append(item)
    ranked = [(place, item) for of_task in by_task.values() for place, item in enumerate(of_task)]
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])[:SHOWN]]


def _pictures(items: Sequence[Item], room: int) -> dict[Path, str]:
    """The data URI of every picture, together within `room` bytes."""
    files = list(dict.fromkeys(item.image for item in items if item.image is not None))
    each = min(_PICTURE_BYTES, (room // max(1, len(files)) - 80) * 3 // 4)  # 80 for the rule of CSS; base64 has 4 for 3
    return {file: "data:image/webp;base64," + base64.b64encode(_thumbnail(file, each)).decode() for file in files}


def _thumbnail(file: Path, limit: int) -> bytes:
    """The picture as WebP of at most `limit` bytes, as large as that allows."""
    side = next((side for side, _ in _SIZES if side * side * _BYTES_PER_PIXEL <= limit), _SIZES[-1][0])
    try:
        with Image.open(file) as opened:
            # (thumbnail lets JPEG decode at a smaller size, but must not interpolate between the numbers of a palette.)
            picture = opened if opened.mode in ("RGB", "L", "CMYK") else opened.convert("RGB")
            picture.thumbnail((side, side))
            picture = picture.convert("RGB")
    except Exception as error:  # as in data.images.load_rgb
        raise UserError(f"{file}: {image_error(file, error)}") from error
    content = b""
    for size, quality in _SIZES:
        if size <= side:
            picture.thumbnail((size, size))
            stream = io.BytesIO()
            picture.save(stream, "WEBP", quality=quality, method=4)
            content = stream.getvalue()
            if len(content) <= limit:
                break
    return content


def _render(comparison: Comparison, items: Sequence[Item], pictures: dict[Path, str]) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["short"] = lambda text: text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
    uris = list(dict.fromkeys(pictures.values()))
    places = {uri: place for place, uri in enumerate(uris)}
    models = range(1, len(comparison.labels))
    instructions = {
        task: _instruction([i.question for i in comparison.items if i.task == task]) for task in comparison.tasks
    }
    text = environment.get_template("compare.html").render(
        labels=comparison.labels,
        tasks={name: task_label(name) for name in comparison.tasks},
        kinds=KINDS,
        cells=table_cells(comparison.rows),
        target=comparison.target and task_label(comparison.target),
        figure=_figure(comparison),
        notes=comparison.notes,
        counts=[{task or "all": comparison.counts(m, task) for task in (None, *comparison.tasks)} for m in models],
        total=len(comparison.items),
        items=items,
        lines=lambda item: _lines(item.question, instructions[item.task]),
        instructions={task: line for task, line in instructions.items() if line},
        captions=comparison.captions,
        uris=uris,
        place={file: places[uri] for file, uri in pictures.items()},
        gold_shown=_GOLD,
        clear=CLEAR_CIDER,
        good=GOOD_CAPTION,
    )
    return text.encode("utf-8", "replace")


def _figure(comparison: Comparison) -> str | None:
    """The Source-Target figure as a data URI of SVG; None unless every model has both scores."""
    rows = [(label, row["source"], row["target"]) for label, row in comparison.rows]
    if any(source is None or target is None for _, source, target in rows):
        return None
    name = task_label(comparison.target) if comparison.target else "Target"
    stream = io.BytesIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llava_sculpt", "font.family": "sans-serif"}):
        figure = draw_source_target(rows, target_name=name)
        figure.set_size_inches(5.4, 3.8 + 0.2 * len(rows))
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(stream.getvalue()).decode()


def _instruction(questions: Sequence[str]) -> str:
    """The last line of all questions of a task, if it is one and the same: it need be read only once."""
    ends = {question.rpartition("\n")[2] for question in questions}
    return ends.pop() if len(ends) == 1 and len(questions) > 1 else ""


def _lines(question: str, instruction: str) -> tuple[str, str]:
    """The first line of a question and what follows, without the instruction that ends it."""
    first, _, rest = question.removesuffix(instruction).strip().partition("\n")
    return first, rest
