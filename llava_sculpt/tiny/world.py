"""Entry of the world: writes all six tasks as raw files in the official formats of the real data sets."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from llava_sculpt.locks import output_lock
from llava_sculpt.records import WRITING
from llava_sculpt.tiny.draw import draw_world
from llava_sculpt.tiny.raw_sources import WRITERS
from llava_sculpt.tiny.raw_targets import write_coco, write_iconqa


def write_raw_world(out: Path, seed: int = 0) -> None:
    """Write `<out>/raw/<task>/` for the six tasks, replacing an earlier world. One seed, one set of bytes.

    The folder is built aside and renamed at the end, so `<out>/raw` is complete or not there. Another process that
    writes it is waited for; what a killed one left is removed.
    """
    world = draw_world(seed)
    partial, raw = out / f".raw{WRITING}", out / "raw"
    with output_lock(raw, wait=True):
        try:
            shutil.rmtree(partial, ignore_errors=True)
            write_iconqa(world, partial / "iconqa")
            write_coco(world, partial / "coco")
            for name, write in WRITERS.items():
                write(world, partial / name, seed)
            if raw.exists():
                shutil.rmtree(raw)
            partial.replace(raw)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    """`python -m llava_sculpt.tiny.world --out data/tiny`."""
    parser = argparse.ArgumentParser(description="Write the tiny world's raw files.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_raw_world(args.out, args.seed)


if __name__ == "__main__":
    main()
