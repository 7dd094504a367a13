"""Peak memory and time of `llava-sculpt prepare` on files of the real size: OCR-VQA and GQA's largest.

    python benchmarks/prepare_memory.py [--folder DIR] [--plain]

Writes OCR-VQA's dataset.json (207,572 books, about a million questions) and a GQA question file of a million
questions with their scene-graph programs (about 1.5 GB, deleted at the end) and prepares both in processes of their
own. With --plain `json.load` of the same files is measured too.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

BOOKS = 207_572
QUESTIONS = 1_000_000
_QUESTIONS_OF_A_BOOK = (
    "Who wrote this book?",
    "What is the title of this book?",
    "What type of book is this?",
    "Is this a comedy book?",
    "Is this christianity book?",
)


def _words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(
        "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10)))
        for _ in range(rng.randint(least, most))
    )


def write_ocrvqa(raw: Path) -> None:
    """`dataset.json` in the official format; covers of val and test as links to one picture."""
    rng = random.Random(0)
    (raw / "images").mkdir(parents=True)
    cover = raw / "images" / "cover.jpg"
    Image.new("RGB", (300, 400)).save(cover)
    with (raw / "dataset.json").open("w") as stream:
        for number in range(BOOKS):
            book = f"{number:010d}"
            split = rng.choices((1, 2, 3), (8, 1, 1))[0]
            title, author, genre = _words(rng, 4, 16), _words(rng, 2, 3), _words(rng, 1, 3)
            record = {
                "imageURL": f"http://ecx.images-amazon.com/images/I/{_words(rng, 1, 1)}.jpg",
                "questions": list(_QUESTIONS_OF_A_BOOK),
                "answers": [author, title, genre, "No", "Yes"],
                "title": title,
                "authorName": author,
                "genre": genre,
                "split": split,
            }
            stream.write(("{" if number == 0 else ", ") + json.dumps(book) + ": " + json.dumps(record))
            if split != 1:
                os.link(cover, raw / "images" / f"{book}.jpg")
        stream.write("}")


def write_gqa(raw: Path) -> None:
    """A val file of a million questions in the official format, and a small testdev file; 100 pictures."""
    rng = random.Random(1)
    (raw / "images").mkdir(parents=True)
    for number in range(100):
        Image.new("RGB", (500, 375)).save(raw / "images" / f"{2_300_000 + number}.jpg")
    for name, count in (("val", QUESTIONS), ("testdev", 12_578)):
        with (raw / f"{name}_balanced_questions.json").open("w") as stream:
            for number in range(count):
                steps = [
                    {
                        "operation": "select",
                        "argument": f"{_words(rng, 1, 1)} ({rng.randrange(10**7)})",
                        "dependencies": [],
                    }
                    for _ in range(rng.randint(2, 5))
                ]
                record = {
                    "semantic": steps,
                    "entailed": [f"{rng.randrange(10**8):09d}" for _ in range(rng.randint(0, 20))],
                    "equivalent": [f"{rng.randrange(10**8):09d}"],
                    "question": _words(rng, 5, 14) + "?",
                    "imageId": str(2_300_000 + rng.randrange(100)),
                    "isBalanced": True,
                    "groups": {"global": _words(rng, 1, 1), "local": _words(rng, 1, 1)},
                    "answer": _words(rng, 1, 1),
                    "semanticStr": _words(rng, 8, 16),
                    "annotations": {"answer": {"0": "1"}, "question": {"2": "3"}, "fullAnswer": {"4": "5"}},
                    "types": {"detailed": "existAttrC", "semantic": "attr", "structural": "verify"},
                    "fullAnswer": _words(rng, 4, 10),
                }
                stream.write(("{" if number == 0 else ", ") + f'"{number:09d}": ' + json.dumps(record))
            stream.write("}")


def measure(command: list[str]) -> tuple[float, float]:
    """Seconds and peak resident MB (10^6 bytes) of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"failed: {' '.join(command)}")
    return time.perf_counter() - started, usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    """See the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the files are written (default: the system's)")
    parser.add_argument("--plain", action="store_true", help="json.load too")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for name, write, largest in (
            ("ocrvqa", write_ocrvqa, "dataset.json"),
            ("gqa", write_gqa, "val_balanced_questions.json"),
        ):
            raw = folder / name
            write(raw)
            size = (raw / largest).stat().st_size / 1e6
            prepare = [sys.executable, "-m", "llava_sculpt.cli", "prepare", name, "--raw", str(raw)]
            seconds, peak = measure([*prepare, "--out", str(folder / "out" / name)])
            print(f"{name}: {largest} {size:,.0f} MB: prepare {seconds:.0f} s, peak {peak:,.0f} MB", flush=True)
            if options.plain:
                load = f"import json; json.load(open({str(raw / largest)!r}))"
                seconds, peak = measure([sys.executable, "-c", load])
                print(f"{name}: json.load alone {seconds:.0f} s, peak {peak:,.0f} MB", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
